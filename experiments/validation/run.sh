#!/usr/bin/env bash
# Measure error rates and coverages of saexp's inference, and write the table of the docs.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$PYTHON" experiments/validation/simulate.py experiments/validation/measured/after.csv "$@"
"$PYTHON" experiments/validation/table.py
