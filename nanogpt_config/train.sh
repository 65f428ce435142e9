#!/usr/bin/env bash
# From text to models/NAME/ckpt.pt, which run.py opens: nanoGPT's train.py with our settings.
#
#   bash nanogpt_config/train.sh              supertiny on 500M tokens of OpenWebText, on one GPU
#   GPUS=4 bash nanogpt_config/train.sh supertiny
#   bash nanogpt_config/train.sh demo_cpu     the demo model on Python's library: 8 minutes on a CPU
#   bash nanogpt_config/train.sh supertiny --batch_size=16 --gradient_accumulation_steps=32
#
# NAME is a file of this folder without .py; what follows it are options of train.py. Settings:
#   GPUS=N           default 1
#   DATA=folder      of prepare.py; default: made in data/
#   NANOGPT=folder   a checkout of nanoGPT; default: cloned into nanoGPT/, at the commit below
#   PY=python        that has requirements.txt; default: .venv, made by make
# Killed? The same command goes on: train.py from its last evaluation, all else from where it was.
set -euo pipefail
from=$PWD
cd "$(dirname "$0")/.."
absolute() { case $1 in /* | "") echo "$1" ;; *) echo "$from/$1" ;; esac; }
DATA=$(absolute "${DATA:-}")
NANOGPT=$(absolute "${NANOGPT:-}")
commit=3adf61e154c3fe3fca428ad6bc3818b27a3b8291 # 2025-11-12, with which these files were tried
name=${1:-supertiny}
options=("${@:2}")
out=$PWD/models/$name

fail() {
  echo "train.sh: error: $*" >&2
  exit 2
}
if [ -e "$out/ckpt.pt" ]; then
  echo "done before: models/$name/ckpt.pt (remove the folder to start again)"
  exit
fi

# 1. an environment; nanoGPT needs nothing that requirements.txt has not
if [ -z "${PY:-}" ]; then
  make .venv/installed
  PY=$PWD/.venv/bin/python
fi
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # so small a model is fastest so

# 2. are the settings sound? Said before anything is fetched
case $name in
  demo_cpu) text=stdlib data=${DATA:-$PWD/data/stdlib-bpe} ;;
  *) text=openwebtext data=${DATA:-$PWD/data/openwebtext-gpt2} ;;
esac
options=("--dataset=$data" "--out_dir=$out/run" ${options[@]+"${options[@]}"})
check=("$PY" nanogpt_config/check.py --overrides "$name" --gpus "${GPUS:-1}" -- "${options[@]}")
"${check[@]}"

# 3. the text as token ids
if [ -z "$DATA" ]; then
  "$PY" nanogpt_config/prepare.py --source "$text" --output-dir "$data"
  "${check[@]}" # now against the text as well
fi

# 4. nanoGPT
if [ -z "$NANOGPT" ]; then
  NANOGPT=$PWD/nanoGPT
  if [ ! -e "$NANOGPT/train.py" ]; then
    git clone --quiet https://github.com/karpathy/nanoGPT "$NANOGPT" ||
      fail "no nanoGPT: clone it where there is network and set NANOGPT to the folder"
    git -C "$NANOGPT" checkout --quiet $commit
  fi
fi
[ -e "$NANOGPT/train.py" ] || fail "NANOGPT=$NANOGPT holds no train.py: give a checkout of nanoGPT"

# 5. train. Without an override file train.py trains a model of 124 million weights
launch=("$PY")
if [ "${GPUS:-1}" -gt 1 ]; then
  launch=("$PY" -m torch.distributed.run --standalone "--nproc_per_node=$GPUS")
fi
if [ -e "$out/run/ckpt.pt" ]; then
  options+=(--init_from=resume)
fi
overrides=$PWD/nanogpt_config/$name.py
(cd "$NANOGPT" && "${launch[@]}" train.py "$overrides" "${options[@]}")

# 6. the checkpoint, with the tokenizer if the text has its own; then what the model is worth
if [ -e "$data/tokenizer.json" ]; then
  cp "$data/tokenizer.json" "$out/"
fi
"$PY" nanogpt_config/convert.py --checkpoint "$out/run/ckpt.pt" --data "$data"
mv "$out/run/ckpt.pt" "$out/ckpt.pt"
echo "done: python run.py --model models/$name/ckpt.pt --dataset $data/val.bin"
