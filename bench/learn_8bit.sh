#!/bin/sh
# Learning in 8 bits: a Mixtral of about 110 M parameters from random weights, the same seed, data and
# order of samples in bf16, fp8 and mxfp8; held-out losses at the end and every 25 steps.
#   bench/learn_8bit.sh DATA EVAL_DATA OUT [STEPS]     (on a GPU; DEVICE=cpu elsewhere, which is slow)
# DATA: what tools/make_model/corpus.py makes, or any JSON lines. Then, for a plot (ninja loss_curves),
#   build/release/loss_curves OUT.svg bf16=OUT/bf16 fp8=OUT/fp8 mxfp8=OUT/mxfp8
set -eu
[ $# -ge 3 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; }
data=$1 eval_data=$2 out=$3 steps=${4:-500}
moetune=${MOETUNE:-build/release/moetune}
device=${DEVICE:-cuda}
batch=${BATCH:-64}
[ "$steps" -gt 50 ] || { echo "STEPS must be above 50, the warm-up's" >&2; exit 2; }
tokenizer=$(dirname "$0")/../models/tiny
mkdir -p "$out/init"
cp "$tokenizer"/tokenizer.json "$tokenizer"/tokenizer_config.json \
  "$tokenizer"/special_tokens_map.json "$out/init/"
# 8 layers of hidden 768, 12 heads over 4, 8 experts of ffn 640: every width is blocks of 128.
sed -e 's/"hidden_size": [0-9]*/"hidden_size": 768/' -e 's/"head_dim": [0-9]*/"head_dim": 64/' \
  -e 's/"intermediate_size": [0-9]*/"intermediate_size": 640/' \
  -e 's/"num_attention_heads": [0-9]*/"num_attention_heads": 12/' \
  -e 's/"num_key_value_heads": [0-9]*/"num_key_value_heads": 4/' \
  -e 's/"num_hidden_layers": [0-9]*/"num_hidden_layers": 8/' \
  "$tokenizer/config.json" >"$out/init/config.json"
rm -rf "$out/start"
"$moetune" convert --init "$out/init/config.json" --out "$out/start" --seed 1 --dtype fp32
"$moetune" inspect "$out/start" >"$out/start.txt"
grep '^total ' "$out/start.txt"
for precision in ${PRECISIONS:-bf16 fp8 mxfp8}; do
  rm -rf "${out:?}/$precision"
  "$moetune" train --model "$out/start" --data "$data" --eval-data "$eval_data" \
    --out "$out/$precision" --precision "$precision" --experts fused --device "$device" \
    --batch-size "$batch" --max-seq-length 256 --warmup-steps 50 --train-steps $((steps - 50)) \
    --lr 1e-3 --lr-schedule cosine --weight-decay 0.1 --train-on-prompt --seed 1 --samples 0 \
    --log-every 25 --eval-every 25 --save-every "$steps" >"$out/$precision.log" 2>&1 ||
    { tail -5 "$out/$precision.log"; exit 1; }
  losses=$(grep -o '"eval_loss": *[0-9.]*' "$out/$precision/metrics.jsonl") ||
    { echo "$precision: no held-out loss" >&2; exit 1; }
  printf '%-6s %s\n' "$precision" "$(printf '%s\n' "$losses" | tail -n 1)"
done
