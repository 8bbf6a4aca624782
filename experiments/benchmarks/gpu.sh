#!/usr/bin/env bash
# Run the benchmarks of collecting, corpora, training, steering and generating on one machine, in
# under 6 minutes; prints one table and writes results.json.
#
#     bash experiments/benchmarks/gpu.sh [RESULTS]            # where saexp is installed
#     bash FOLDER/gpu.sh [RESULTS]                            # in the folder of prepare.sh
#     DEVICE=cpu bash experiments/benchmarks/gpu.sh [RESULTS] # the same with small sizes
#
# SECONDS_EACH bounds each benchmark (default 65); one that fails or takes longer has a line that
# says so, and its log is in RESULTS.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
results=${1:-gpu_results}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
limit=${SECONDS_EACH:-65}
mkdir -p "$results"
results=$(cd "$results" && pwd)

if [ -d "$here/wheels" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" \
        "$here"/wheels/*.whl || exit
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export HF_HUB_OFFLINE=1 WANDB_MODE=disabled PYTHONUNBUFFERED=1

if [ "$device" = cuda ]; then
    collect=(--shape 2b --texts 1280 --repeats 3 --batch-size 64)
    corpus=(--models tiny,gemma2-small --dtypes bfloat16 --threads 8 --scale 4 --repeats 3 --only speed)
    train=(--models smollm --architectures topk --tools sae-lens --dtypes bfloat16 --only speed
        --width 16384 --batch-size 4096 --batch-tokens 32768 --buffer-rows 65536 --steps 64
        --threads 8 --repeats 1)
    steer=(--shape 2b --prompts 40 --latents 4 --repeats 1)
    generate=(--shape 2b --prompts 256 --batch-size 64 --repeats 2)
else
    collect=(--shape small --texts 16 --repeats 1)
    corpus=(--models tiny --scale 0.02 --repeats 1 --only speed)
    train=(--models tiny --architectures topk --tools sae-lens --only speed --texts 300 --width 256
        --buffer-rows 4096 --steps 8 --repeats 1)
    steer=(--shape tiny --prompts 4 --latents 2 --new-tokens 4 --repeats 1)
    generate=(--shape small --prompts 4 --new-tokens 4 --batch-size 4 --repeats 1)
fi

# benchmark NAME ARGUMENTS...
benchmark() {
    local name=$1 began=$SECONDS
    shift
    if [ ! -f "$here/$name.py" ]; then
        echo "$name.py is not in $here" > "$results/$name.log"
        echo "127 0" > "$results/$name.status"
        return
    fi
    (cd "$here" && timeout "$limit" "$python" "$name.py" --device "$device" "$@") \
        > "$results/$name.log" 2>&1
    echo "$? $((SECONDS - began))" > "$results/$name.status"
    echo "$name: $(cut -d' ' -f2 "$results/$name.status") s" >&2
}

rm -f "$results"/*.status
benchmark collect "${collect[@]}" --out "$results/collect.json"
benchmark corpus "${corpus[@]}" --out "$results/corpus.csv"
benchmark train "${train[@]}" --out "$results/train.csv"
benchmark steer "${steer[@]}" --out "$results/steer"
benchmark generate "${generate[@]}" --out "$results/generate"
"$python" "$here/summary.py" "$results" "$device"
