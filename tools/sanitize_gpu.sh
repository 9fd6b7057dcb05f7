#!/usr/bin/env bash
# compute-sanitizer over the GPU tests of a build: memcheck and racecheck, some at a time.
#   tools/sanitize_gpu.sh BUILD_DIR LOG_DIR [SECONDS]
# SECONDS: the most that one program may take under one tool (300). Prints a line for each run;
# fails where a tool reports an error, a test fails or time runs out.
set -uo pipefail
build=$1 logs=$2 limit=${3:-300}
export PATH=$PATH:/usr/local/cuda/bin
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed" >&2; exit 2; }
mkdir -p "$logs"

# PROGRAM[:TEST][@SHAPES]: a test alone; how many of a program's shapes, smallest first.
runs=(
  test_cuda_backends:native_fp32 test_cuda_backends:native_bf16
  test_cuda_backends:portable_fp32 test_cuda_backends:portable_bf16
  test_cuda_backends:native_bf16_states
  test_cuda_grouped@4 test_cuda_experts@4 test_cuda_fp8@4 test_cuda_attention
  test_cuda_golden test_cuda_recompute test_cuda_properties
)

check() { # TOOL RUN
  local tool=$1 run=$2 shapes="" only="" log status=0 began=$SECONDS
  log=$logs/$tool.${run//[:@]/.}.log
  [[ $run == *@* ]] && shapes=${run#*@} && run=${run%@*}
  [[ $run == *:* ]] && only=${run#*:} && run=${run%:*}
  # shellcheck disable=SC2086
  MOETUNE_TEST=${only:-*} timeout "$limit" compute-sanitizer --tool "$tool" --error-exitcode 9 \
    --print-limit 20 "$build/$run" $shapes >"$log" 2>&1 || status=$?
  printf '%-9s %-40s %4d s  status %3d  %s\n' "$tool" "$run ${only:-}" $((SECONDS - began)) $status \
    "$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -1 | sed 's/=* //')"
  return $status
}
export -f check
export logs limit build
printf '%s\n' "${runs[@]/#/memcheck }" "${runs[@]/#/racecheck }" |
  xargs -P "${JOBS:-8}" -L 1 bash -c 'check "$@"' check || { echo "not clean: see $logs" >&2; exit 1; }
