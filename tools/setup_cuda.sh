#!/bin/sh
# Makes sure that there is an nvcc with cuBLASLt (and NCCL, for several GPUs, beside it): the system's, or NVIDIA's own packages from PyPI,
# which are put together under .cache/cuda/root (CMake looks there). Needs python3 with venv.
#   tools/setup_cuda.sh
set -eu
cd "$(dirname "$0")/.."
root=.cache/cuda/root
version=13.0

if command -v nvcc >/dev/null 2>&1 || [ -x /usr/local/cuda/bin/nvcc ] || [ -x "$root/bin/nvcc" ]; then
  echo "set-up: nvcc is there"
  exit 0
fi
echo "set-up: no nvcc; fetching NVIDIA's compiler and cuBLAS $version from PyPI into .cache/cuda"
python3 -m venv .cache/cuda/venv
.cache/cuda/venv/bin/pip install --quiet "nvidia-cuda-nvcc==$version.*" "nvidia-cuda-crt==$version.*" \
  "nvidia-nvvm==$version.*" "nvidia-cuda-runtime==$version.*" "nvidia-cublas==$version.*" \
  "nvidia-cuda-cccl==$version.*" "nvidia-nvtx==$version.*" nvidia-nccl-cu13
found=$(find "$PWD/.cache/cuda/venv/lib" -type d -path '*/nvidia/cu13' | head -n 1)
[ -n "$found" ] || { echo "set-up: NVIDIA's packages lack nvidia/cu13" >&2; exit 1; }
# The names under which a linker and CMake look for what the packages hold.
[ -e "$found/lib64" ] || ln -s lib "$found/lib64"
for library in "$found"/lib/*.so.*; do
  plain=${library%%.so.*}.so
  [ -e "$plain" ] || ln -s "$(basename "$library")" "$plain"
done
# NCCL's package has a folder of its own; it is wanted at run time alone, by several GPUs.
nccl=$(find "$PWD/.cache/cuda/venv/lib" -name 'libnccl.so.2' | head -n 1)
[ -z "$nccl" ] || [ -e "$found/lib/libnccl.so.2" ] || ln -s "$nccl" "$found/lib/libnccl.so.2"
ln -sfn "$found" "$root"
"$root/bin/nvcc" --version | tail -n 2 | head -n 1
