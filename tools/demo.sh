#!/bin/sh
# Fine-tunes the shipped model on the shipped data and shows what that changed.
#   tools/demo.sh [MOETUNE] [--min-fall NATS]
# --min-fall: fail unless the held-out loss fell by that much.
set -eu
cd "$(dirname "$0")/.."
moetune=build/release/moetune
min_fall=
while [ $# -gt 0 ]; do
  case $1 in
  --min-fall) min_fall=$2; shift 2 ;;
  *) moetune=$1; shift ;;
  esac
done
model=models/tiny
train=data/jargon.train.jsonl
heldout=data/jargon.eval.jsonl
out=runs/demo
question='What is a kluge?'

for needed in "$moetune" "$model/config.json" "$train" "$heldout"; do
  [ -e "$needed" ] || { echo "demo: $needed is missing" >&2; exit 1; }
done

heldout_loss() {
  "$moetune" eval --model "$1" --data "$heldout" --json |
    sed -n 's/.*"loss": *\([0-9.eE+-]*\).*/\1/p' | head -n 1
}
answer() {
  "$moetune" generate --model "$1" --chat --prompt "$question" --max-new-tokens 60 \
    --temperature 0 </dev/null
}

echo "== before: $model"
loss_before=$(heldout_loss "$model")
sample_before=$(answer "$model")
echo "held-out loss $loss_before"
echo "== fine-tuning on $train"
rm -rf "$out"
"$moetune" train --model "$model" --data "$train" --eval-data "$heldout" --out "$out" \
  --batch-size 8 --max-seq-length 256 --warmup-steps 5 --train-steps 60 --lr 3e-4
checkpoint=$out/model
loss_after=$(heldout_loss "$checkpoint")
sample_after=$(answer "$checkpoint")

cat <<REPORT

Held-out loss     $loss_before before, $loss_after after (mean cross-entropy, nats a token)
Question          $question
Answer before     $sample_before
Answer after      $sample_after
Checkpoint        $checkpoint
REPORT
if [ -n "$min_fall" ]; then
  awk -v a="$loss_before" -v b="$loss_after" -v least="$min_fall" 'BEGIN {
    if (a == "" || b == "" || !(a - b >= least)) {
      printf "demo: held-out loss fell by %g, at least %g expected\n", a - b, least
      exit 1
    }
    printf "demo: held-out loss fell by %g (at least %g)\n", a - b, least
  }'
fi
