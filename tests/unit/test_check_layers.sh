#!/bin/sh
# tools/check_layers.sh passes this tree and names each planted violation.
set -eu
here=$(cd "$(dirname "$0")/../.." && pwd)
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
sh "$here/tools/check_layers.sh" "$here"

# FILE | line of C | message, or "passes"
while IFS='|' read -r file line want; do
  rm -rf "$tree/src"
  mkdir -p "$tree/src/$(dirname "$file")"
  printf '/* system() in a comment */\n%s\n' "$line" >"$tree/src/$file"
  status=0
  out=$(sh "$here/tools/check_layers.sh" "$tree" 2>&1) || status=$?
  if [ "$want" = passes ]; then
    [ $status = 0 ] || { echo "$file: '$line' must pass, got: $out"; exit 1; }
  else
    [ $status != 0 ] || { echo "$file: '$line' went unnoticed"; exit 1; }
    [ "$out" = "src/$file:2: $want" ] || { echo "$file: '$line': unexpected: $out"; exit 1; }
  fi
done <<'CASES'
model/a.c|#include "par/mesh.h"|model must not include par/mesh.h
model/a.c|#include "hf/config.h"|model must not include hf/config.h
model/a.c|#include "kernels/registry.h"|model must not include kernels/registry.h
model/a.c|#include "quant/recipe.h"|passes
base/a.h|#include "backend/tensor.h"|base must not include backend/tensor.h
io/a.c|#include "hf/config.h"|io must not include hf/config.h
hf/a.c|#include "io/safetensors.h"|passes
train/a.c|#include "kernels/registry.h"|passes
train/a.c|#include "kernels/cpu/cpu.h"|train must not include kernels/cpu/cpu.h
cli/a.c|#include "train/options.h"|passes
train/a.c|#include "cli/options.h"|train must not include cli/options.h
api/a.c|#include "moetune/moetune.h"|passes
api/a.c|#include "train/step.h"|passes
api/a.c|#include "cli/options.h"|api must not include cli/options.h
train/a.c|#include "moetune/moetune.h"|train must not include moetune/moetune.h
train/a.c|#include "api/api.h"|train must not include api/api.h
base/a.h|#include "moetune/error.h"|passes
kernels/cpu/a.c|#include "model/model.h"|kernels must not include model/model.h
quant/a.c|#include <cuda_runtime.h>|CUDA header outside kernels/cuda
kernels/cuda/a.cu|#include <cuda_runtime.h>|passes
base/a.c|void f(char *d) { strcpy(d, "x"); }|strcpy() is banned
base/a.c|int f(void) { return atoi ("1"); }|atoi() is banned
base/a.c|const char *f = "system(1)"; // system()|passes
train/a.c|void f(void) { exit(1); }|exit() outside cli/
cli/a.c|void f(void) { exit(1); }|passes
CASES
