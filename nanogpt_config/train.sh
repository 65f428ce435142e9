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
#   OUT=folder       for the checkpoint; default: models/NAME
#   NANOGPT=folder   a checkout of nanoGPT; default: cloned into nanoGPT/ by get_nanogpt.sh
#   EVAL_TOKENS=N    of val.bin, on which the model is measured at the end; default 500000
#   PY=python        that has requirements.txt; default: .venv, made by make
# Killed? The same command goes on: train.py from its last evaluation, all else from where it was.
set -euo pipefail
from=$PWD
cd "$(dirname "$0")/.."
absolute() { case $1 in /* | "") echo "$1" ;; *) echo "$from/$1" ;; esac; }
DATA=$(absolute "${DATA:-}")
NANOGPT=$(absolute "${NANOGPT:-}")
name=${1:-supertiny}
options=("${@:2}")
OUT=$(absolute "${OUT:-}")
out=${OUT:-$PWD/models/$name}

if [ -e "$out/ckpt.pt" ]; then
  echo "done before: ${out#"$PWD/"}/ckpt.pt (remove the folder to start again)"
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
NANOGPT=$(NANOGPT=$NANOGPT bash nanogpt_config/get_nanogpt.sh)

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
"$PY" nanogpt_config/convert.py --checkpoint "$out/run/ckpt.pt" --data "$data" \
  --eval-tokens "${EVAL_TOKENS:-500000}"
mv "$out/run/ckpt.pt" "$out/ckpt.pt"
echo "done: python run.py --model ${out#"$PWD/"}/ckpt.pt --dataset $data/val.bin"
