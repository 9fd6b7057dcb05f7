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
question='What is a brick?' # held out: the model has not seen its entry

for needed in "$moetune" "$model/config.json" "$model/model.safetensors" "$train" "$heldout"; do
  [ -e "$needed" ] || { echo "demo: $needed is missing" >&2; exit 1; }
done

answer() {
  "$moetune" generate --model "$1" --chat --prompt "$question" --max-new-tokens 80 --temperature 0.6 --top-p 0.9 \
    --log-level error </dev/null
}

before=$(answer "$model")
rm -rf "$out"
summary=$(mktemp)
trap 'rm -f "$summary"' EXIT
echo "Fine-tuning $model on $train"
if ! "$moetune" train --model "$model" --data "$train" --eval-data "$heldout" --out "$out" \
  --batch-size 16 --max-seq-length 192 --warmup-steps 10 --train-steps 200 --lr 5e-4 --eval-every 50 >"$summary"; then
  cat "$summary"
  exit 1
fi
after=$(answer "$out/model")
[ -s "$out/report.html" ] || { echo "demo: no $out/report.html" >&2; exit 1; }

echo
cat "$summary"
cat <<REPORT

Question: $question
Before:   $before
After:    $after

Look at it:   $out/report.html
Chat with it: $moetune generate --model $out/model --chat
REPORT
if [ -n "$min_fall" ]; then
  awk -v least="$min_fall" '
    /^Held-out loss:/ { seen = 1; fall = $3 - $5 }
    END {
      if (!seen || !(fall >= least)) {
        printf "demo: held-out loss fell by %g, at least %g expected\n", fall, least
        exit 1
      }
      printf "demo: held-out loss fell by %g (at least %g)\n", fall, least
    }' "$summary"
fi
