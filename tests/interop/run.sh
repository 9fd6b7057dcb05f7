#!/bin/sh
# Fine-tunes a model for a few steps and lets transformers open what was exported, and the original.
#   tests/interop/run.sh [MOETUNE] [MODEL_DIR]
# Defaults: build/release/moetune, models/tiny (with random weights where it has none). Python:
# $PYTHON, else .venv/hf/bin/python (bench/vs_hf_cpu.py makes it), else python3. Exit 77: no
# transformers there.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
moetune=${1:-$root/build/release/moetune}
model=${2:-$root/models/tiny}
python=${PYTHON:-$root/.venv/hf/bin/python}
[ -x "$python" ] || python=python3
# Other libraries' settings have no say here.
unset OPENBLAS_CORETYPE OPENBLAS_L2_SIZE
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1

if ! "$python" -c 'import torch, transformers, safetensors' 2>/dev/null; then
  echo "skipped: $python has no torch and transformers"
  exit 77
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! ls "$model"/*.safetensors >/dev/null 2>&1; then
  "$moetune" convert --init "$model" --out "$work/fresh" --seed 3 --dtype bf16
  model=$work/fresh
fi
head -n 64 "$root/data/jargon.train.jsonl" >"$work/train.jsonl"
"$moetune" train --model "$model" --data "$work/train.jsonl" --out "$work/run" --batch-size 8 \
  --max-seq-length 128 --warmup-steps 1 --train-steps 7 --lr 1e-3 --max-shard-size 4MB
"$moetune" convert --model "$work/run/model" --out "$work/packed" --layout packed --dtype fp32
"$python" "$root/tests/interop/check_export.py" --moetune "$moetune" --generate \
  "$model" "$work/run/model" "$work/packed"
