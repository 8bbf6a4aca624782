#!/usr/bin/env bash
# Study E on the shipped model, or on another: MODEL="model=llama8b sae=llamascope" LAYER=7 DATA=dataset.path=FILE.csv
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/memorization}
study="experiment=memorization ${MODEL:-model=tiny} layer=${LAYER:-2} ${DATA:-} ${QUIET:-tracker=none} ${EXTRA:-}"
# shellcheck disable=SC2086
{
  "$python" -m saexp $study analyzer=stats hydra.run.dir="$out/stats"
  "$python" -m saexp $study hydra.run.dir="$out/contrast"
}
