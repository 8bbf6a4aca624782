#!/usr/bin/env bash
# Make the shipped model, its control and their SAEs from nothing, and measure them; 2 cores.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-../../.venv/bin/python}
assets=${1:-build}
"$python" train_lm.py --out "$assets/tiny/model" --seed 0 & one=$!
"$python" train_lm.py --out "$assets/tiny_control/model" --seed 0 --control & other=$!
wait "$one"
wait "$other"
./train_saes.sh "$assets"
"$python" export.py --out "$assets/tiny"
measure() {
  "$python" measure.py --model "$assets/$1/model" --sae "$assets/$1/sae" --out "measured/$1.json"
}
measure tiny & one=$!
measure tiny_control & other=$!
wait "$one"
wait "$other"
"$python" measure.py --card README.md
