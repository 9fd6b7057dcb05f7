#!/bin/sh
# Makes the shipped model, models/tiny, from Debian packages: corpus, tokenizer, pre-training.
#   tools/make_model/run.sh [--prepare]     --prepare: data and tokenizer, no training
# Needs apt-get, dpkg, python3 with venv, and build/release/moetune. What is downloaded and made on
# the way lies under .cache/make_model. The data and the tokenizer come out byte for byte; the
# weights do on the same machine with the same number of threads.
#
# The shape: 9.6 M parameters (19.2 MB in bf16), of which a token uses 3.7 M: 4 layers of hidden 256,
# 8 experts of ffn 320, top-2; 4096 pieces with a tied head, which at this size would otherwise be a
# fifth of the model. The corpus has 110 k documents, 10.4 M tokens, 94 a document on average. A step
# takes 32 of them, about 3 k tokens, and 2600 steps are three quarters of an epoch: at this size many
# small steps learn more in half an hour on 2 cores than few large ones, and nothing is seen twice.
# The learning rate is what models of this width stand (2e-3), raised over 100 steps, then a cosine;
# the router's auxiliary loss (0.02, in config.json) keeps the experts in use. Every token is a
# target, the questions' too: they are English like the rest.
set -eu
cd "$(dirname "$0")/../.."
moetune=${MOETUNE:-build/release/moetune}
cache=.cache/make_model
out=models/tiny
steps=${STEPS:-2500}
mkdir -p "$cache"

if [ ! -x "$cache/venv/bin/python" ]; then
  python3 -m venv "$cache/venv"
  "$cache/venv/bin/pip" install --quiet -r tools/make_model/requirements.txt
fi
python3 tools/make_model/jargon.py "$cache" data
python3 tools/make_model/corpus.py "$cache" "$cache"
"$cache/venv/bin/python" tools/make_model/tokenizer.py \
  "$cache/corpus.jsonl" "$cache/corpus.valid.jsonl" "$out"
[ "${1:-}" = --prepare ] && exit 0

rm -rf "$cache/init" "$cache/run" "$cache/bf16"
"$moetune" convert --init "$out/config.json" --out "$cache/init" --seed 1 --dtype fp32
"$moetune" train --model "$cache/init" --data "$cache/corpus.jsonl" \
  --eval-data "$cache/corpus.valid.jsonl" --out "$cache/run" --precision fp32 \
  --batch-size 32 --max-seq-length 256 --warmup-steps 100 --train-steps "$steps" \
  --lr 2e-3 --lr-schedule cosine --weight-decay 0.1 --train-on-prompt --seed 1 \
  --log-every 20 --eval-every 500 --save-every 500
"$moetune" convert --model "$cache/run/model" --out "$cache/bf16" --dtype bf16
for file in "$cache"/bf16/*.safetensors "$cache/bf16/config.json"; do
  cp "$file" "$out/"
done
ls -l "$out"
