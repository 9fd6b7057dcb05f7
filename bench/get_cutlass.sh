#!/bin/sh
# CUTLASS's headers, a peer of bench/grouped_gemm, from PyPI into .cache/cutlass. No part of moetune
# needs them. Then:
#   tools/build.sh cuda --configure-only -DMOETUNE_CUTLASS_DIR=$PWD/.cache/cutlass
#   ninja -C build/cuda grouped_gemm      (a minute or two of compiling)
set -eu
cd "$(dirname "$0")/.."
version=4.2.0.0
if [ -e .cache/cutlass/include/cutlass/cutlass.h ]; then
  echo "CUTLASS is there: .cache/cutlass"
  exit 0
fi
rm -rf .cache/cutlass .cache/cutlass-wheel
mkdir -p .cache/cutlass-wheel
python3 -m pip download --quiet --no-deps --dest .cache/cutlass-wheel "nvidia-cutlass==$version"
python3 -m zipfile -e .cache/cutlass-wheel/*.whl .cache/cutlass-wheel/x
mv .cache/cutlass-wheel/x/cutlass_library/source .cache/cutlass
rm -rf .cache/cutlass-wheel
echo "CUTLASS $version: .cache/cutlass"
