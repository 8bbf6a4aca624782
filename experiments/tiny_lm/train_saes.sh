#!/usr/bin/env bash
# The SAEs of the tiny models by the project's own task=train: train_saes.sh FOLDER [MODELS]
# FOLDER/<name>/sae is made; the models are in MODELS/<name>/model (FOLDER where not given).
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-../../.venv/bin/python}
out=$1 models=${2:-$1}
export OMP_NUM_THREADS=1
saexp() { # name, layers, words of its own
  "$python" -m saexp -m model=hf model.name="$models/$1/model" layer="$2" positions=all resume=false \
    dataset=text dataset.path="$out/texts.txt" dataset.max_length=128 store.dtype=float16 \
    cache_dir="$out/cache" tracker=none "${@:3}"
}
collect() { saexp "$1" '[0,1,2,3,4]' task=collect hydra.sweep.dir="$out/$1/collecting"; }
train() { # name, layers, width, k, batch size of 1200 steps
  saexp "$1" "$2" task=train width="$3" sae_trainer=batchtopk sae_trainer.n_samples=$((1200 * $5)) \
    sae_trainer.batch_size="$5" sae_trainer.lr=2e-3 sae_trainer.lr_warm_up=0 sae_trainer.lr_decay=0.5 \
    sae_trainer.dead_feature_window=100 \
    sae_trainer.options.k="$4" +sae_trainer.options.aux_loss_coefficient=0.03125 \
    hydra.sweep.dir="$out/$1/training/width_$3_layers_${2//,/_}"
}
rm -rf "$out/tiny/training" "$out/tiny_control/training"
"$python" texts.py --out "$out/texts.txt"
collect tiny & one=$!
collect tiny_control & other=$!
wait "$one"
wait "$other"
# Two lines of work of equal length; an SAE takes as long at either width, by its batch.
{ train tiny 0,1,2,3,4 512 11 1024 && train tiny_control 3,4 256 7 2048; } & one=$!
{ train tiny 0,1,2,3,4 256 7 2048 && train tiny_control 0,1,2 256 7 2048; } & other=$!
wait "$one"
wait "$other"
ship() { "$python" ship_saes.py --sweeps "$out/$1/training" --name "$1" --out "$out/$1/sae"; }
ship tiny & one=$!
ship tiny_control & other=$!
wait "$one"
wait "$other"
