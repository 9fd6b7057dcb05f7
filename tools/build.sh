#!/bin/sh
# Configures (once) and builds a CMake preset into build/PRESET.
#   tools/build.sh PRESET [--configure-only] [CMake options...]
set -eu
cd "$(dirname "$0")/.."
preset=$1
shift
build=yes
if [ "${1:-}" = --configure-only ]; then
  build=no
  shift
fi
if ! command -v cmake >/dev/null 2>&1 || ! command -v ninja >/dev/null 2>&1; then
  echo "cmake and ninja are needed: run 'make setup' (it installs what is missing)" >&2
  exit 1
fi
# ninja configures again by itself when CMake's files change; options given here need it now.
if [ ! -f "build/$preset/build.ninja" ] || [ $# -gt 0 ]; then
  log=$(mktemp)
  trap 'rm -f "$log"' EXIT
  if ! cmake --preset "$preset" "$@" >"$log" 2>&1; then
    cat "$log" >&2
    echo "configuring failed; 'make setup' installs missing packages" >&2
    exit 1
  fi
fi
[ $build = no ] || cmake --build --preset "$preset" ${CI:+-- --quiet}
