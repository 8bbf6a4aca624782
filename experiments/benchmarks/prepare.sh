#!/usr/bin/env bash
# Make a folder with all that gpu.sh needs on a machine without a network: wheels and scripts.
#
#     bash experiments/benchmarks/prepare.sh FOLDER [PYTHON_VERSION]
#
# PYTHON_VERSION is that of the other machine (x86-64 Linux), such as 3.12; by default this one's.
# PyTorch with its CUDA libraries is taken from there. Run this in the environment of `make run`
# (PYTHON=.venv/bin/python), whose metadata say what saexp depends on. Copy FOLDER to the other
# machine and type there: bash FOLDER/gpu.sh
set -euo pipefail

folder=${1:?type the folder to make}
python=${PYTHON:-python3}
version=${2:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)

mkdir -p "$folder/wheels"
cp "$here"/*.py "$here/gpu.sh" "$folder"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder/wheels" "$root"

# All that saexp depends on, directly or not, in the versions of constraints.txt.
"$python" - "$root/constraints.txt" > "$folder/requirements.txt" <<'PY'
import re
import sys
from importlib import metadata

from packaging.requirements import Requirement

LEFT_OUT = re.compile(r"torch|triton|nvidia-.*|cuda-.*|saexp")
with open(sys.argv[1], encoding="utf-8") as file:
    pinned = dict(line.split("#")[0].strip().split("==") for line in file if "==" in line)
todo, found = ["saexp"], set()
while todo:
    for line in metadata.requires(todo.pop()) or ():
        wanted = Requirement(line)
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if applies and name not in found and not LEFT_OUT.fullmatch(name):
            found.add(name)
            todo.append(name)
for name in sorted(found):
    print(f"{name}=={pinned.get(name) or metadata.version(name)}")
PY

platforms=(--platform manylinux2014_x86_64)
for glibc in 39 35 34 31 28 27 24 17; do
    platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done
while read -r requirement; do
    if ! "$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
        --python-version "$version" "${platforms[@]}" --dest "$folder/wheels" "$requirement" \
        2> "$folder/pip.log"; then
        # Only the source is published; its wheel must fit any machine.
        "$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder/wheels" "$requirement"
        name=$(printf '%s' "${requirement%%==*}" | tr '.-' '__')
        if ! find "$folder/wheels" -iname "${name}-*-none-any.whl" | grep -q .; then
            echo "$requirement has no wheel for Python $version: $(tail -n 1 "$folder/pip.log")" >&2
            exit 1
        fi
    fi
done < "$folder/requirements.txt"
rm -f "$folder/pip.log"
echo "$folder: $(find "$folder/wheels" -name '*.whl' | wc -l) wheels, $(du -sh "$folder" | cut -f1)"
