#!/bin/sh
# Runs every fuzzer of a build for some seconds, as many at once as there are cores:
#   tools/fuzz.sh BUILD_DIR SECONDS
# Starts from tests/fuzz/corpus/NAME; new inputs stay in BUILD_DIR/fuzz/NAME, crashes beside them.
set -eu
cd "$(dirname "$0")/.."
build=$1
seconds=$2
mkdir -p "$build/fuzz"
run_one() {
  name=$1
  mkdir -p "$build/fuzz/$name"
  corpus=tests/fuzz/corpus/$name
  [ -d "$corpus" ] || corpus=
  # shellcheck disable=SC2086 # corpus is one word or none
  if "$build/fuzz_$name" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 \
    -malloc_limit_mb=1024 -max_len=65536 -print_final_stats=1 \
    -artifact_prefix="$build/fuzz/$name-" "$build/fuzz/$name" $corpus \
    >"$build/fuzz/$name.log" 2>&1; then
    echo "fuzz $name: $(awk '/number_of_executed_units/ {print $2}' "$build/fuzz/$name.log") runs, no finding"
  else
    tail -60 "$build/fuzz/$name.log"
    echo "fuzz $name: FAILED, see $build/fuzz/$name.log"
    return 1
  fi
}
running=0
pids=''
status=0
for source in tests/fuzz/fuzz_*.c; do
  [ -e "$source" ] || { echo "no fuzzers"; exit 0; }
  name=$(basename "$source" .c)
  run_one "${name#fuzz_}" &
  pids="$pids $!"
  running=$((running + 1))
  if [ "$running" -ge "$(nproc)" ]; then
    for pid in $pids; do wait "$pid" || status=1; done
    pids=''
    running=0
  fi
done
for pid in $pids; do wait "$pid" || status=1; done
exit $status
