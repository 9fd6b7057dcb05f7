#!/bin/sh
# Packs programs with the libraries they need into a directory that runs on another Linux machine
# (x86-64-v3, glibc not older than this one's; for a GPU its driver alone).
#   tools/dist.sh OUT_DIR [--without-cuda-libraries] [PROGRAM...]
# Default program: build/dist/moetune. Libraries go to OUT_DIR/lib; the loader, libc and what belongs
# to the driver stay out. Builds nothing: run `make dist`, which calls this.
set -eu
cd "$(dirname "$0")/.."
out=$1
shift
cuda=yes
if [ "${1:-}" = --without-cuda-libraries ]; then
  cuda=no
  shift
fi
[ $# -gt 0 ] || set -- build/dist/moetune
command -v patchelf >/dev/null || { echo "patchelf is missing: tools/setup.sh --dist installs it" >&2; exit 1; }
rm -rf "$out"
mkdir -p "$out/lib"
for program in "$@"; do
  cp "$program" "$out/"
  ldd "$program" | awk '$2 == "=>" && $3 ~ /^\// { print $1, $3 }'
done | sort -u | while read -r name path; do
  case $name in
  libc.so.* | libm.so.* | libpthread.so.* | libdl.so.* | librt.so.* | ld-linux* | libcuda.so.*) continue ;;
  libcublas* | libcudnn* | libnccl*) [ $cuda = yes ] || continue ;;
  esac
  cp -L "$path" "$out/lib/$name"
done
# NCCL is loaded by name, not linked: where this machine has it, it goes along.
nccl=$(ldconfig -p | awk '$1 == "libnccl.so.2" { print $NF; exit }')
for near in /usr/local/cuda/lib64 .cache/cuda/root/lib; do
  [ -n "$nccl" ] || [ ! -e "$near/libnccl.so.2" ] || nccl=$near/libnccl.so.2
done
[ $cuda = no ] || [ -z "$nccl" ] || cp -L "$nccl" "$out/lib/libnccl.so.2"
# A library with a path of its own (Debian's Open MPI) would not look where the program's RPATH says.
for file in "$out"/lib/*; do
  [ -z "$(patchelf --print-rpath "$file")" ] || patchelf --remove-rpath "$file"
done
# All that is needed lies here, but for the C library.
if [ $cuda = yes ]; then
  here=$(cd "$out" && pwd)
  for program in "$@"; do
    env -i PATH="$PATH" ldd "$here/$(basename "$program")"
  done | awk '$2 == "=>"' | grep -vE "=> $here/|^[[:space:]]*(libc|libm|libpthread|libdl|librt)\.so" >"$out/outside.txt" || :
  if [ -s "$out/outside.txt" ]; then
    echo "not packed:" >&2
    sort -u "$out/outside.txt" >&2
    exit 1
  fi
  rm -f "$out/outside.txt"
fi
echo "packed $* into $out ($(du -sh "$out" | cut -f1))"
