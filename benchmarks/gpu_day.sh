#!/usr/bin/env bash
# All measurements of a GPU in one command, in nine minutes at most: gpu_day.py says which. It never
# installs anything; it takes the python and the packages that it finds.
#
#     bash benchmarks/gpu_day.sh                 on a machine with a GPU
#     bash benchmarks/gpu_day.sh --cpu-smoke     all parts at tiny sizes on a CPU (or DRY=1)
#     bash benchmarks/gpu_day.sh --only figure --model FOLDER
#
# PYTHON: which python, default python3. OUT: where results go, default results/DATE_gpu_day.
# WHEELS: a folder of wheels for packages that this python lacks, made where there is a network:
#     pip download --no-deps --dest WHEELS tyro docstring_parser typeguard
# What is installed is left as it is.
set -u
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
if [ -n "${WHEELS:-}" ]; then
    unpacked=$(mktemp -d) || exit 2
    trap 'rm -rf "$unpacked"' EXIT
    for wheel in "$WHEELS"/*.whl; do
        file=$(basename "$wheel")
        "$PYTHON" -c "import importlib.metadata as m; m.version('${file%%-*}')" 2> /dev/null \
            || "$PYTHON" -m zipfile --extract "$wheel" "$unpacked" || exit 2
    done
    export PYTHONPATH="$unpacked${PYTHONPATH:+:$PYTHONPATH}"
fi
"$PYTHON" benchmarks/gpu_day.py ${DRY:+--cpu-smoke} "$@"
