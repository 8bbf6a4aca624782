#!/usr/bin/env bash
# Study A on the shipped model (no arguments), or on another: MODEL="model=gemma2b_it sae=gemmascope" LAYERS=9,13,20 LAYER=13
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
model=${MODEL:-model=tiny}
layers=${LAYERS:-0,1,2,3,4}
layer=${LAYER:-2}
out=${OUT:-outputs/entity_recognition}
quiet=${QUIET:-tracker=none}
study="experiment=entity_recognition $model $quiet ${EXTRA:-}"
run() { "$python" -m saexp "$@"; }
# shellcheck disable=SC2086
{
  # Layer curves, MaxMin, general latents: no causal test, one forward pass for all layers.
  run -m $study layer="$layers" intervention=none analyzer.attribution=false hydra.sweep.dir="$out/layers"
  # Steering with all controls; answers, cost, attention, attribution. 12 effects are tested, so that a p-value of 1/250
  # is the smallest that can be significant with room to spare.
  run intervention.n_controls=249 $study layer="$layer" hydra.run.dir="$out/steer"
  # The same latents silenced on their own group's prompts; moved to the other group's values.
  run $study layer="$layer" intervention=ablate intervention.outcomes='[refusal,accuracy,answer_logit,neutral_kl]' \
    intervention.directions='[latents]' hydra.run.dir="$out/ablate"
  run $study layer="$layer" intervention=clamp intervention.outcomes='[refusal,accuracy,answer_logit,neutral_kl]' \
    intervention.directions='[latents]' hydra.run.dir="$out/clamp"
  # Which layer carries it: the stream at the entity's last token, from a paired prompt.
  run $study layer="$layer" intervention=patch intervention.outcomes='[refusal,answer_logit]' \
    intervention.directions='[latents]' analyzer.attribution=false hydra.run.dir="$out/patch"
  # The directions taken out of the weights.
  run $study layer="$layer" intervention=orthogonalize intervention.outcomes='[refusal,accuracy]' \
    analyzer.attribution=false hydra.run.dir="$out/orthogonalize"
  # A probe beside the latents, on the same tokens.
  run $study layer="$layer" analyzer=probe intervention=none hydra.run.dir="$out/probe"
}
