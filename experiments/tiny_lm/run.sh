#!/usr/bin/env bash
# Make the shipped model, its control and their SAEs from nothing, and measure them; 2 cores.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-../../.venv/bin/python}
assets=${1:-build}
"$python" train_lm.py --out "$assets/tiny/model" --seed 0 &
"$python" train_lm.py --out "$assets/tiny_control/model" --seed 0 --control &
wait
"$python" train_saes.py --model "$assets/tiny/model" --out "$assets/tiny/sae" &
"$python" train_saes.py --model "$assets/tiny_control/model" --out "$assets/tiny_control/sae" --widths 256 &
wait
"$python" export.py --out "$assets/tiny"
for name in tiny tiny_control; do
  "$python" measure.py --model "$assets/$name/model" --sae "$assets/$name/sae" --out "measured/$name.json"
done
"$python" measure.py --card README.md
