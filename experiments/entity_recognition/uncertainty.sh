#!/usr/bin/env bash
# Study A, uncertainty: does the end of a question tell whether the answer that follows will be right?
# On the shipped model, asked in words it was not trained on (no arguments), or on another:
#   MODEL="model=gemma2b_it sae=gemmascope sae.release=gemma-scope-2b-pt-res-canonical" \
#   LAYERS=9,13,20 LAYER=13 AT="positions=indices positions.indices=[-2]"
set -euof pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
python=${PYTHON:-.venv/bin/python}
layers=${LAYERS:-0,1,2,3,4}
layer=${LAYER:-2}
out=${OUT:-outputs/uncertainty}
common="${MODEL:-model=tiny} ${QUIET:-tracker=none} ${EXTRA:-}"
study="experiment=uncertainty $common ${AT:-} dataset.path=$out/label/answers.jsonl"
probe="analyzer=probe analyzer.k=[5] analyzer.strengths=[0.01,0.1,1]"
probe="$probe analyzer.within=[entity_type,attribute] analyzer.unseen=entity_type"
run() { "$python" -m saexp "$@"; }
# shellcheck disable=SC2086
{
  # The model answers every question once; each answer is judged.
  if [ -n "${MODEL:-}" ]; then
    run task=label task.n_samples=0 $common hydra.run.dir="$out/label"
  else
    run experiment=uncertainty_words $common dataset.path="$here/facts.jsonl" hydra.run.dir="$out/label"
    run experiment=uncertainty_statements $common dataset.path="$here/facts.jsonl" hydra.run.dir="$out/statements"
    probe="$probe analyzer.transfer=$out/statements/answers_all.jsonl"
  fi
  # Latents that tell right from wrong answers, over layers.
  run -m $study layer="$layers" hydra.sweep.dir="$out/layers"
  # The best latent beside probes, on every question: held-out entities, unseen types, other wording.
  run $study layer="$layer" dataset.path="$out/label/answers_all.jsonl" $probe hydra.run.dir="$out/probe"
}
