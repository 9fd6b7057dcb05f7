#!/bin/bash
# Everything that wants several GPUs of one host, in one run:
#   bench/multi_gpu.sh [GPUS] [OUT_DIR]        GPUS: 2 (default), 4 or 8
# What a part says and its exit status go to OUT_DIR/PART.log; a part that fails stops none. PARTS in
# the environment names those to run: bandwidth tests equality kill ladder
#   BUILD=build/release   where moetune, bench's comm and the tests are (ninja comm test_gpu_ranks)
#   DRY_RUN=1             prints the commands alone
set -u
cd "$(dirname "$0")/.."
gpus=${1:-2}
out=${2:-runs/multi_gpu}
build=${BUILD:-build/release}
moetune=$build/moetune
parts=${PARTS:-bandwidth tests equality kill ladder}
mkdir -p "$out"
export NCCL_NVLS_ENABLE=0 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

ranks() { # N COMMAND...
  local n=$1
  shift
  echo mpirun -n "$n" --bind-to none --oversubscribe --mca btl_vader_single_copy_mechanism none "$@"
}

run() { # PART SECONDS COMMAND...: appends to the part's log
  local part=$1 limit=$2
  shift 2
  echo "+ $*" | tee -a "$out/$part.log"
  [ -z "${DRY_RUN:-}" ] || return 0
  timeout -k 5 "$limit" "$@" >>"$out/$part.log" 2>&1
  local status=$?
  echo "  exit status $status" | tee -a "$out/$part.log"
  return $status
}

small=(train --model models/tiny --data data/jargon.train.jsonl --device cuda --graphs off
  --max-seq-length 192 --warmup-steps 0 --lr 5e-4 --eval-every 0 --log-every 1 --samples 0)

# 1. All-to-all and sums as moetune's communicators reach them, beside NCCL's own.
bandwidth() {
  run bandwidth 90 $(ranks 2 "$build/comm" 1024)
  [ "$gpus" = 2 ] || run bandwidth 90 $(ranks "$gpus" "$build/comm" 1024)
}

# Every call of the communicators, gradients and steps against one GPU; NCCL, and its substitute.
tests() {
  run tests 60 "$build/test_gpu_ranks"
  run tests 90 $(ranks 2 "$build/test_gpu_ranks")
  [ "$gpus" = 2 ] || run tests 120 $(ranks "$gpus" "$build/test_gpu_ranks")
  MOETUNE_SHARED_GPU=1 CUDA_VISIBLE_DEVICES=0 run tests 90 $(ranks 4 "$build/test_gpu_ranks")
}

# 3. Twenty steps of a small model with the same global batches on every mesh: losses within bf16's
# rounding of one GPU's, and the same bits twice.
mesh() { # NAME RANKS OPTIONS...
  local name=$1 n=$2
  shift 2
  run equality 60 $(ranks "$n" "$moetune" "${small[@]}" --train-steps 20 --out "$out/$name" \
    --batch-size $((16 / n)) "$@")
}
equality() {
  rm -rf "$out"/eq-*
  run equality 60 "$moetune" "${small[@]}" --train-steps 20 --out "$out/eq-one" --batch-size 16
  mesh eq-ep2 2 --ep-size 2
  mesh eq-ep2-again 2 --ep-size 2
  mesh eq-dp2 2
  if [ "$gpus" = 8 ]; then
    mesh eq-ep2-dp4 8 --ep-size 2
    mesh eq-ep4-dp2 8 --ep-size 4
    mesh eq-pp2-ep4 8 --pp-size 2 --ep-size 4
  fi
  [ -n "${DRY_RUN:-}" ] || python3 - "$out" <<'P' | tee -a "$out/equality.log"
import json, os, sys
out = sys.argv[1]
def losses(name):
    path = os.path.join(out, name, "metrics.jsonl")
    if not os.path.exists(path): return None
    rows = [json.loads(line) for line in open(path)]
    return [r["loss"] for r in rows if "grad_norm" in r]
one = losses("eq-one")
for name in sorted(n for n in os.listdir(out) if n.startswith("eq-") and n != "eq-one"):
    x = losses(name)
    if not one or not x or len(x) != len(one): print(f"{name}: has no {len(one or [])} steps"); continue
    print(f"{name}: loss off by {max(abs(a - b) / b for a, b in zip(x, one)):.1e} of one GPU's at most")
a, b = losses("eq-ep2"), losses("eq-ep2-again")
print("ep 2 twice:", "the same bits" if a and a == b else "DIFFERENT")
P
}

# 4. A rank that is killed in the middle: all end with a message; the run goes on with fewer GPUs.
kill_one() {
  rm -rf "$out/killed"
  local command
  command=$(ranks "$gpus" "$moetune" "${small[@]}" --train-steps 3000 --save-every 500 --keep-last 2 \
    --out "$out/killed" --batch-size 2 --ep-size 2 --comm-timeout 20)
  echo "+ $command, one rank killed after 8 s" | tee -a "$out/kill.log"
  [ -z "${DRY_RUN:-}" ] || return 0
  timeout -k 5 90 $command >>"$out/kill.log" 2>&1 &
  local launcher=$!
  sleep 8
  local victim
  victim=$(pgrep -f -- "--out $out/killed" | grep -vx "$launcher" | tail -n 1)
  [ -z "$victim" ] || kill -9 "$victim"
  local start=$SECONDS
  wait $launcher
  echo "  exit status $?, $((SECONDS - start)) s after the kill; left over: $(pgrep -cf -- "--out $out/killed")" |
    tee -a "$out/kill.log"
  run kill 60 $(ranks $((gpus / 2)) "$moetune" "${small[@]}" --train-steps 3000 --out "$out/killed" \
    --batch-size 4 --resume)
}

# 2. Every rung at Mixtral-8x7B's width on the same global tokens.
ladder() {
  local layers=4
  [ "$gpus" != 8 ] || layers=32
  cat >"$out/mixtral-8x7b.json" <<'J'
{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
 "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
 "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
 "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
 "tie_word_embeddings": false, "hidden_act": "silu", "router_aux_loss_coef": 0.02}
J
  run ladder 400 $(ranks "$gpus" "$moetune" ladder --random "$out/mixtral-8x7b.json" --layers "$layers" \
    --batch-size 1 --max-seq-length 8192 --ep-size "$gpus" --device cuda --optim-state bf16 \
    --recompute mlp --svg "$out/ladder.svg")
}

for part in $parts; do
  : >"$out/$part.log"
  echo "== $part"
  case $part in
  kill) kill_one ;;
  bandwidth | tests | equality | ladder) $part ;;
  *) echo "no part '$part'" >&2 ;;
  esac
  [ -n "${DRY_RUN:-}" ] || tail -n 25 "$out/$part.log"
done
