#!/bin/bash
# Everything that wants several GPUs of one host, in one run of less than ten minutes:
#   bench/multi_gpu.sh [GPUS] [OUT_DIR] [PART...]     GPUS: 2 (default), 4 or 8
# Parts: bandwidth ladder hf equality kill (all of these by default), and tests. Each runs alone too;
# what it says and its exit status go to OUT_DIR/PART.log, its table to the screen; one that fails
# stops none, and makes the exit status 1.
#   BUILD=build/release   where moetune, bench's comm and the tests are (ninja comm test_gpu_ranks)
#   PYTHON=python3        that has torch, transformers and accelerate
#   TOTAL=570             seconds for all parts; what comes later is cut off
#   DEVICE=cpu            tries the parts on small sizes without a GPU (all but bandwidth and tests)
#   DRY_RUN=1             prints the commands alone
set -u
cd "$(dirname "$0")/.." || exit 1
gpus=${1:-2}
out=${2:-runs/multi_gpu} out=${out%/}
shift $(($# < 2 ? $# : 2))
case $gpus in
2 | 4 | 8) ;;
*) echo "usage: bench/multi_gpu.sh [2|4|8] [OUT_DIR] [PART...]" >&2 && exit 2 ;;
esac
wanted=(bandwidth ladder hf equality kill)
[ $# = 0 ] || wanted=("$@")
build=${BUILD:-build/release}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
deadline=${TOTAL:-570}
moetune=$build/moetune
failed=0
mkdir -p "$out"
logs=$out
dry=${DRY_RUN:-}
[ -z "$dry" ] || { logs=$(mktemp -d) && trap 'rm -rf "$logs"' EXIT; } # a dry run leaves results alone
wipe() { [ -n "$dry" ] || rm -rf "$@"; }
export NCCL_NVLS_ENABLE=0 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
[ "$device" = cuda ] || export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

ranks() { # N: sets `launch`, the launcher of N ranks
  launch=(mpirun -n "$1" --bind-to none --oversubscribe --mca btl_vader_single_copy_mechanism none)
  [ "$1" != 1 ] || launch=()
}

run() { # PART SECONDS COMMAND...: appends to the part's log
  local part=$1 limit=$2 left=$((deadline - SECONDS))
  shift 2
  echo "+ $*" | tee -a "$logs/$part.log"
  [ -z "$dry" ] || return 0
  [ "$limit" -le "$left" ] || limit=$left
  local status=124 begin=$SECONDS
  if [ "$limit" -gt 0 ]; then
    timeout -k 5 "$limit" "$@" >>"$logs/$part.log" 2>&1
    status=$?
  fi
  echo "  exit status $status after $((SECONDS - begin)) s" | tee -a "$logs/$part.log"
  [ $status = 0 ] || failed=1
  return $status
}

# 1. All-to-all and sums as moetune's communicators reach them, beside NCCL's own.
bandwidth() {
  [ "$device" = cuda ] || { echo "bandwidth wants GPUs" && return; }
  for n in 2 4 8; do # beside two always
    [ "$n" = 2 ] || [ "$n" = "$gpus" ] || continue
    ranks "$n"
    run bandwidth 90 "${launch[@]}" "$build/comm" 1024
  done
}

# Every call of the communicators, gradients, steps and stages against one GPU; NCCL, its substitute.
tests() {
  [ "$device" = cuda ] || { echo "tests want GPUs" && return; }
  run tests 60 "$build/test_gpu_ranks"
  for n in 2 4 8; do
    [ "$n" -le "$gpus" ] || continue
    ranks "$n"
    run tests 150 "${launch[@]}" "$build/test_gpu_ranks"
  done
  ranks 4
  MOETUNE_SHARED_GPU=1 CUDA_VISIBLE_DEVICES=0 run tests 90 "${launch[@]}" "$build/test_gpu_ranks"
}

# 2. Every rung at Mixtral-8x7B's width on the same global tokens, with bf16 states.
config=models/mixtral-8x7b.json
length=8192
steps=(--warmup-steps 2 --train-steps 6)
case $gpus in
2) layers=4 ;;
4) layers=8 ;;
8) layers=32 ;;
esac
if [ "$device" = cpu ]; then
  config=$out/small.json length=32 layers=4
  steps=(--warmup-steps 1 --train-steps 2)
  cat >"$config" <<'J'
{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 64,
 "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
 "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 128,
 "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
 "tie_word_embeddings": false, "hidden_act": "silu", "router_aux_loss_coef": 0.02}
J
fi
ladder() {
  ranks "$gpus"
  run ladder 200 "${launch[@]}" "$moetune" ladder --random "$config" --layers "$layers" --batch-size 1 \
    --max-seq-length "$length" --ep-size "$gpus" --device "$device" --precision bf16 --optim-state bf16 \
    --recompute mlp "${steps[@]}" --svg "$out/ladder.svg"
}

# transformers' device_map="auto" on the work of the ladder.
hf() {
  local all=()
  [ "$device" = cuda ] || all=(--gpus "$gpus")
  run hf 150 "$python" bench/hf_device_map.py --config "$config" --layers "$layers" --batch-size 1 \
    --max-seq-length "$length" "${steps[@]}" --device "$device" "${all[@]}"
}

# 3. Twenty steps of a small model with the same samples and micro-batches on every mesh: losses within
# bf16's rounding of one GPU's; and twice the same bits. Its head is its own, as stages want it.
small=(train --data data/jargon.train.jsonl --device "$device" --precision bf16 --graphs off
  --max-seq-length 192 --warmup-steps 0 --lr 5e-4 --eval-every 0 --log-every 1 --samples 0)
small_model() { # PART
  [ ! -d "$out/small" ] || return 0
  if [ -z "$dry" ]; then
    rm -rf "$out/untied" && mkdir -p "$out/untied"
    cp models/tiny/*token* "$out/untied"
    sed 's/"tie_word_embeddings": true/"tie_word_embeddings": false/' models/tiny/config.json >"$out/untied/config.json"
  fi
  run "$1" 60 "$moetune" convert --init "$out/untied" --out "$out/small" --dtype bf16
}
mesh() { # NAME RANKS READERS OPTIONS...
  local name=$1 readers=$3
  ranks "$2"
  shift 3
  run equality 60 "${launch[@]}" "$moetune" "${small[@]}" --model "$out/small" --train-steps 20 \
    --out "$out/$name" --batch-size $((8 / readers)) --micro-batches 2 "$@"
}
equality() {
  wipe "$out"/eq-*
  small_model equality
  mesh eq-one 1 1
  for again in "" -again; do
    mesh eq-ep2"$again" 2 2 --ep-size 2
    mesh eq-dp2"$again" 2 2
    mesh eq-pp2"$again" 2 1 --pp-size 2
    [ "$gpus" != 4 ] || mesh eq-pp2-ep2"$again" 4 2 --pp-size 2 --ep-size 2
    [ "$gpus" != 8 ] || mesh eq-ep2-dp4"$again" 8 8 --ep-size 2
    [ "$gpus" != 8 ] || mesh eq-ep8"$again" 8 8 --ep-size 8
    [ "$gpus" != 8 ] || mesh eq-pp2-ep4"$again" 8 4 --pp-size 2 --ep-size 4
  done
  [ -z "$dry" ] || return 0
  compare >"$out/equality.txt" 2>&1 || failed=1
  tee -a "$logs/equality.log" <"$out/equality.txt"
  ! grep -qw NO "$out/equality.txt" || failed=1
}
compare() {
  "$python" - "$out" <<'P'
import hashlib, json, os, sys
out = sys.argv[1]
def losses(name):
    try:
        with open(os.path.join(out, name, "metrics.jsonl")) as f:
            return [r["loss"] for r in map(json.loads, f) if "grad_norm" in r]
    except OSError:
        return []
def weights(name):
    try:
        with open(os.path.join(out, name, "model", "model.safetensors"), "rb") as f:
            return hashlib.sha256(f.read()).hexdigest()
    except OSError:
        return None
one = losses("eq-one")
print(f"{'mesh':12} {'steps':>5} {'last loss':>10} {'off one GPU at most':>20} {'within 5e-3':>12}  same bits twice")
names = [n for n in sorted(os.listdir(out)) if n.startswith("eq-") and not n.endswith("-again") and n != "eq-one"]
for name in names:
    x, y = losses(name), losses(name + "-again")
    if not one or len(x) != len(one):
        print(f"{name[3:]:12} {len(x):5d} of {len(one)} steps: NO")
        continue
    off = max(abs(a - b) / b for a, b in zip(x, one))
    same = x == y and weights(name) is not None and weights(name) == weights(name + "-again")
    print(f"{name[3:]:12} {len(x):5d} {x[-1]:10.5f} {off:20.1e} {'yes' if off < 5e-3 else 'NO':>12}  {'yes' if same else 'NO'}")
P
}

# 4. A rank that is killed in the middle: all end with a message; the run goes on with fewer GPUs.
kill_one() {
  local victim='' launcher status start limit=$((deadline - SECONDS)) more=()
  wipe "$out/killed"
  small_model kill
  ranks "$gpus"
  local command=("${launch[@]}" "$moetune" "${small[@]}" --model "$out/small" --save-every 20 --keep-last 2
    --out "$out/killed" --comm-timeout 20 --batch-size 2 --ep-size 2 --train-steps 100000)
  echo "+ ${command[*]}, one rank killed behind its first checkpoint" | tee -a "$logs/kill.log"
  if [ -z "$dry" ]; then
    [ "$limit" -lt 120 ] || limit=120
    [ "$limit" -gt 0 ] || { failed=1 && return; }
    timeout -k 5 "$limit" "${command[@]}" >>"$logs/kill.log" 2>&1 &
    launcher=$!
    while kill -0 "$launcher" 2>/dev/null && ! ls -d "$out"/killed/checkpoint-* >/dev/null 2>&1; do sleep 0.2; done
    sleep 1
    victim=$(pgrep -f -- "^$moetune train .*--out $out/killed" | tail -n 1)
    [ -z "$victim" ] || kill -9 "$victim"
    start=$SECONDS
    wait "$launcher"
    status=$?
    local took=$((SECONDS - start)) over
    over=$(pgrep -cf -- "^$moetune train .*--out $out/killed")
    echo "  killed ${victim:-none}; exit status $status, all gone ${took} s later, left over: $over" | tee -a "$logs/kill.log"
    { [ -n "$victim" ] && [ $status != 0 ] && [ "$took" -le 30 ] && [ "$over" = 0 ]; } || failed=1
  fi
  local last
  last=$(find "$out" -path "$out/killed/checkpoint-*" -prune -name 'checkpoint-*' 2>/dev/null | sed 's/.*-//' | sort -n | tail -n 1)
  ranks $((gpus / 2))
  [ "$gpus" = 2 ] || more=(--ep-size 2)
  run kill 90 "${launch[@]}" "$moetune" "${small[@]}" --model "$out/small" --out "$out/killed" --resume \
    --batch-size 4 "${more[@]}" --train-steps $((${last:-0} + 10))
}

for part in "${wanted[@]}"; do
  begin=$SECONDS
  echo "== $part"
  case $part in
  bandwidth | tests | ladder | hf | equality | kill) : >"$logs/$part.log" ;;
  *) echo "no part '$part': there are bandwidth ladder hf equality kill tests" >&2 && failed=1 && continue ;;
  esac
  case $part in
  bandwidth) bandwidth ;;
  tests) tests ;;
  ladder) ladder ;;
  hf) hf ;;
  equality) equality ;;
  kill) kill_one ;;
  esac
  [ -n "$dry" ] || grep -v '^+\|^step \|Loading weights' "$logs/$part.log" | tail -n 25
  echo "== $part: $((SECONDS - begin)) s"
done
exit $failed
