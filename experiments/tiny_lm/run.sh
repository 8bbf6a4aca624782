#!/usr/bin/env bash
# Make the shipped model, its control and their SAEs from nothing, and measure them; 2 cores.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-../../.venv/bin/python}
assets=${1:-build}
"$python" train_lm.py --out "$assets/tiny/model" --seed 0 &
"$python" train_lm.py --out "$assets/tiny_control/model" --seed 0 --control &
wait
# Two lines of work of equal length: an SAE of 512 latents takes half as long again as one of 256.
saes() { "$python" train_saes.py --model "$assets/$1/model" --out "$assets/$1/sae" "${@:2}"; }
{ saes tiny --widths 512 && saes tiny_control --widths 256 --layers 4; } &
{ saes tiny --widths 256 && saes tiny_control --widths 256 --layers 0 1 2 3; } &
wait
"$python" export.py --out "$assets/tiny"
for name in tiny tiny_control; do
  "$python" measure.py --model "$assets/$name/model" --sae "$assets/$name/sae" --out "measured/$name.json" &
done
wait
"$python" measure.py --card README.md
