#!/usr/bin/env bash
# Study D on the shipped model: two variants side by side on the middle token of each text.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/train_from_scratch}
# shellcheck disable=SC2086
"$python" -m saexp -m experiment=train_from_scratch model=tiny dataset=entities layer=2 \
  sae_trainer=tutorial,topk ${QUIET:-tracker=none} ${EXTRA:-} hydra.sweep.dir="$out"
