#!/usr/bin/env bash
# Study B on the shipped model: the strongest latents of a text at every layer, then one of them steered.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/prompt_features}
extra="${QUIET:-tracker=none} ${EXTRA:-}"
# shellcheck disable=SC2086
{
  "$python" -m saexp experiment=prompt_features $extra hydra.run.dir="$out/latents"
  "$python" -m saexp experiment=prompt_features layer=2 intervention=steer 'intervention.latents=[131]' \
    'coefficient=[0,0.5,1]' 'intervention.outcomes=[answer_probability,perplexity,neutral_kl]' \
    'dataset.answer=" Mary"' dataset=prompt 'dataset.text="When John and Mary went to the shops, John gave the bag to"' \
    $extra hydra.run.dir="$out/steer"
}
