#!/bin/sh
# Checkpoints that want something: each is refused with a message that names what is wrong, in
# little memory and time, and nothing outside its directory is opened. Runs in the build's directory.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
failures=0
bad() {
  echo "FAILED: $1" >&2
  failures=$((failures + 1))
}
limit='ulimit -v 2000000'
if ldd ./moetune | grep -q asan; then limit=:; fi

# refused MESSAGE : the checkpoint in $dir/m is refused, by training and by the look at it.
refused() {
  for command in "train --data $dir/data.jsonl --out $dir/out --no-cache --chat-template mistral" \
    "convert --out $dir/out" "eval --data $dir/data.jsonl --no-cache --chat-template mistral"; do
    status=0
    # shellcheck disable=SC2086 # words of one command
    sh -c "$limit; exec timeout 20 ./moetune $command --model $dir/m" >"$dir/said" 2>&1 ||
      status=$?
    [ $status = 1 ] || bad "$1: $command gives $status: $(tail -3 "$dir/said")"
    grep -q "moetune: error: .*$1" "$dir/said" ||
      bad "$command says '$(tail -1 "$dir/said")', not '$1'"
  done
}
fresh() { rm -rf "$dir/m" "$dir/out" && cp -r "$dir/good" "$dir/m"; }
index() { # index SHARD : every tensor is said to be in this one
  fresh
  mv "$dir/m/model.safetensors" "$dir/m/a.safetensors"
  printf '{"weight_map":{"model.norm.weight":"%s"}}' "$1" >"$dir/m/model.safetensors.index.json"
}
header() { # header JSON : a safetensors file with this header and 8 bytes of data
  fresh
  { printf "\\$(printf '%03o' $((${#1} % 256)))\\$(printf '%03o' $((${#1} / 256)))\\0\\0\\0\\0\\0\\0"
    printf '%s12345678' "$1"; } >"$dir/m/model.safetensors"
}
config() { # config KEY VALUE
  fresh
  sed -i "s/\"$1\":[^,}]*/\"$1\":$2/" "$dir/m/config.json"
}

mkdir "$dir/seed"
cat >"$dir/seed/config.json" <<'JSON'
{"architectures":["MixtralForCausalLM"],"model_type":"mixtral","bos_token_id":0,"eos_token_id":0,
"hidden_act":"silu","hidden_size":16,"intermediate_size":16,"max_position_embeddings":64,
"num_attention_heads":2,"num_experts_per_tok":2,"num_hidden_layers":2,"num_key_value_heads":1,
"num_local_experts":4,"rms_norm_eps":1e-5,"rope_theta":10000.0,"router_aux_loss_coef":0.02,
"tie_word_embeddings":false,"vocab_size":257,"torch_dtype":"bfloat16"}
JSON
awk 'BEGIN {
  printf "{\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"merges\":[],\"vocab\":{\"<s>\":0"
  for (b = 0; b < 256; b++) printf ",\"<0x%02X>\":%d", b, b + 1
  printf "}}}" }' >"$dir/seed/tokenizer.json"
echo '{"prompt":"q","completion":"a"}' >"$dir/data.jsonl"
./moetune convert --init "$dir/seed" --out "$dir/good" --dtype bf16
./moetune train --model "$dir/good" --data "$dir/data.jsonl" --out "$dir/out" --no-cache \
  --chat-template mistral --train-steps 1 --warmup-steps 0 --no-report --log-level error >/dev/null ||
  bad "the good checkpoint does not train"

cp "$dir/good/model.safetensors" "$dir/outside.safetensors"
for name in ../outside.safetensors "$dir/outside.safetensors" . .. '' a/../../outside.safetensors \
  ./a.safetensors; do
  index "$name"
  refused 'is no plain file name'
done
index absent.safetensors
refused "cannot open '.*absent.safetensors'"

fresh && printf '\377\377\377\377\377\377\377\177{}' >"$dir/m/model.safetensors"
refused 'header length'
fresh && printf 'short' >"$dir/m/model.safetensors"
refused 'too few'
fresh && truncate -s -1 "$dir/m/model.safetensors"
refused 'lie outside\|behind the last'
header '{"t":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}'
refused 'overflows'
header '{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,9223372036854775807]}}'
refused 'lie outside'
header '{"t":{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}}'
refused 'no size'
header '{"t":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}'
refused 'lie outside'
header "$(awk 'BEGIN { for (i = 0; i < 5000; i++) printf "["; }')"
refused 'header: '
fresh
{ printf '\0\0\0\3\0\0\0\0{"t":['
  head -c 50331642 /dev/zero | tr '\0' x | sed 's/xxx/{},/g'; } >"$dir/m/model.safetensors"
refused 'brackets'
fresh && rm "$dir/m/model.safetensors" && mkfifo "$dir/m/model.safetensors"
refused 'regular file'
fresh && rm "$dir/m/config.json" && mkfifo "$dir/m/config.json"
refused 'regular file'

config num_hidden_layers 2000000000
refused 'num_hidden_layers'
config num_hidden_layers 9000000000000000000
refused 'num_hidden_layers'
config hidden_size 1000000
refused 'needs\|head\|hidden_size'
config num_local_experts 1000000000
refused 'num_local_experts'
config vocab_size 1000000000
refused 'needs\|vocab'
config max_position_embeddings -5
refused 'max_position_embeddings'

[ $failures = 0 ] && echo "hostile checkpoints: all refused"
