#!/usr/bin/env bash
# Study E on the shipped model, or on another: MODEL="model=llama8b sae=llamascope" LAYER=7 DATA=dataset.path=FILE.csv
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/memorization}
study="experiment=memorization ${MODEL:-model=tiny} layer=${LAYER:-3} ${DATA:-} ${QUIET:-tracker=none} ${EXTRA:-}"
# shellcheck disable=SC2086
{
  # L0, values, the most frequent latents of each group, their overlap, counts.
  "$python" -m saexp $study analyzer=stats hydra.run.dir="$out/stats"
  # Which latents tell the groups apart, and does steering them change the continuation?
  "$python" -m saexp $study intervention=steer 'coefficient=[0,0.1,0.2,0.4]' hydra.run.dir="$out/contrast"
}
