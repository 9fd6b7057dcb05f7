#!/bin/sh
# Fine-tunes a model for a few steps, goes on from the middle again, and lets TensorBoard's own
# loader read the event files.
#   tests/interop/tensorboard.sh [MOETUNE] [MODEL_DIR]
# Defaults: build/release/moetune, models/tiny. Python: $PYTHON, else python3. Exit 77: no package
# tensorboard there (pip install tensorboard).
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
moetune=${1:-$root/build/release/moetune}
model=${2:-$root/models/tiny}
python=${PYTHON:-python3}
if ! "$python" -c 'import tensorboard' 2>/dev/null; then
  echo "skipped: $python has no tensorboard"
  exit 77
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
head -n 64 "$root/data/jargon.train.jsonl" >"$work/train.jsonl"
head -n 16 "$root/data/jargon.eval.jsonl" >"$work/eval.jsonl"
train() {
  "$moetune" train --model "$model" --data "$work/train.jsonl" --eval-data "$work/eval.jsonl" \
    --out "$work/run" --batch-size 8 --max-seq-length 128 --warmup-steps 1 --train-steps 7 --lr 1e-3 \
    --eval-every 2 --save-every 3 --dead-expert-steps 1 --tensorboard "$@"
}
train
sleep 1 # files are read in the order of their names, which hold seconds
train --resume "$work/run/checkpoint-3"
"$python" "$root/tests/interop/check_tensorboard.py" "$work/run"
