#!/usr/bin/env bash
# Prints the folder of a checkout of nanoGPT at the commit with which these files were tried: that
# of NANOGPT, if it is set, else nanoGPT/ here, cloned if it is not there.
set -euo pipefail
cd "$(dirname "$0")/.."
commit=3adf61e154c3fe3fca428ad6bc3818b27a3b8291 # 2025-11-12
folder=${NANOGPT:-$PWD/nanoGPT}

fail() {
  echo "get_nanogpt.sh: error: $*" >&2
  exit 2
}
if [ -z "${NANOGPT:-}" ] && [ ! -e "$folder/train.py" ]; then
  GIT_TERMINAL_PROMPT=0 git clone --quiet https://github.com/karpathy/nanoGPT "$folder" 2> /dev/null ||
    fail "no nanoGPT: clone it where there is network and set NANOGPT to the folder"
  git -C "$folder" checkout --quiet $commit
fi
[ -e "$folder/train.py" ] || fail "NANOGPT=$folder holds no train.py: give a checkout of nanoGPT"
echo "$folder"
