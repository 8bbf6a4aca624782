#!/usr/bin/env bash
# Measure error rates and coverages of saexp's inference, and what injected faults do; write the
# tables of the docs. What was measured before is kept: delete measured/after.csv or outputs/faults
# to start anew.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$PYTHON" experiments/validation/simulate.py experiments/validation/measured/after.csv "$@"
"$PYTHON" experiments/validation/table.py
"$PYTHON" experiments/validation/faults.py --kills 120 --damages 300 --others 15 --out outputs/faults
cp outputs/faults/faults.csv experiments/validation/faults.csv
"$PYTHON" experiments/validation/faults.py --table
