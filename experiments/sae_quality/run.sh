#!/usr/bin/env bash
# Study C on the shipped model's SAEs, and the capability test on indirect-object sentences.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/sae_quality}
extra="${QUIET:-tracker=none} ${EXTRA:-}"
# shellcheck disable=SC2086
{
  "$python" -m saexp experiment=sae_quality $extra hydra.run.dir="$out/evaluate"
  "$python" -m saexp analyzer=capability dataset=ioi positions=last intervention=none layer=2 $extra \
    hydra.run.dir="$out/capability"
  "$python" -m saexp task=dashboard task.latents=top:20 layer=2 $extra hydra.run.dir="$out/dashboard"
}
