#!/bin/sh
# clang-tidy over src/ with a clang build's compile commands: tools/tidy.sh BUILD_DIR
# The rooms that read files from strangers also get the path-sensitive analyzer.
set -eu
cd "$(dirname "$0")/.."
build=$1
untrusted='-*,clang-analyzer-core*,clang-analyzer-unix*,clang-analyzer-deadcode*'
: >"$build/tidy.log"
run() { # files on standard input, options as arguments
  xargs -r -P "$(nproc)" -n 2 clang-tidy --quiet -p "$build" "$@" 2>&1 |
    grep -v -E '^[0-9]+ warnings? (generated|treated as)|^Suppressed |^Use -header-filter|^$' \
      >>"$build/tidy.log" || true
}
git ls-files -co --exclude-standard 'src/*.c' | run
git ls-files -co --exclude-standard 'src/io/*.c' 'src/hf/*.c' 'src/data/*.c' |
  run "--checks=$untrusted" --warnings-as-errors='*'
if [ -s "$build/tidy.log" ]; then
  cat "$build/tidy.log"
  exit 1
fi
