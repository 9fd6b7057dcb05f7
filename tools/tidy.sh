#!/bin/sh
# clang-tidy over src/ with a clang build's compile commands: tools/tidy.sh BUILD_DIR
# A second pass runs the path-sensitive analyzer (what it leaves out: .clang-tidy).
set -eu
cd "$(dirname "$0")/.."
build=$1
analyzer='-*,clang-analyzer-core.*,clang-analyzer-unix.*,clang-analyzer-deadcode.*'
analyzer="$analyzer,-clang-analyzer-core.NullDereference,-clang-analyzer-core.CallAndMessage"
analyzer="$analyzer,-clang-analyzer-core.UndefinedBinaryOperatorResult,-clang-analyzer-unix.Malloc"
: >"$build/tidy.log"
run() { # files on standard input, options as arguments
  xargs -r -P "$(nproc)" -n 2 clang-tidy --quiet -p "$build" "$@" 2>&1 |
    grep -v -E '^[0-9]+ warnings? (generated|treated as)|^Suppressed |^Use -header-filter|^$' \
      >>"$build/tidy.log" || true
}
git ls-files -co --exclude-standard 'src/*.c' | run
git ls-files -co --exclude-standard 'src/*.c' | run "--checks=$analyzer" --warnings-as-errors='*'
if [ -s "$build/tidy.log" ]; then
  cat "$build/tidy.log"
  exit 1
fi
