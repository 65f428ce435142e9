#!/bin/sh
# Runs remote_job.py on a rented machine with the python that suits best: of those new enough, the
# first whose torch is there, else the first. ssh sessions have a bare PATH, so places are named.
cd "$(dirname "$0")/../.." || exit 3
suits='import importlib.util, sys
new = sys.version_info >= (3, 11)
sys.exit(2 if not new else 0 if importlib.util.find_spec("torch") else 10)'
found=
for python in ${SPARSE_CODING_PYTHON:-python3 /venv/main/bin/python /opt/conda/bin/python python}; do
  "$python" -c "$suits" 2> /dev/null
  case $? in
    0) exec "$python" -m sparse_coding.rental.remote_job "$@" ;;
    10) found=${found:-$python} ;;
  esac
done
if [ -n "$found" ]; then
  exec "$found" -m sparse_coding.rental.remote_job "$@"
fi
echo "no python 3.11 or newer in the image: choose another --image" >&2
exit 3
