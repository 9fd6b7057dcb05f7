#!/bin/sh
# clang-tidy (checks: .clang-tidy) over src/ with a clang build's compile commands:
#   tools/tidy.sh BUILD_DIR
set -eu
cd "$(dirname "$0")/.."
log=$1/tidy.log
if git ls-files -co --exclude-standard 'src/*.c' |
  xargs -P "$(nproc)" -n 2 clang-tidy --quiet -p "$1" --warnings-as-errors='*' >"$log" 2>&1; then
  exit 0
fi
grep -v -E 'warnings? (generated|treated)' "$log"
exit 1
