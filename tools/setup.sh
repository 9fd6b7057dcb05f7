#!/bin/sh
# Installs what the build needs and the machine lacks, with apt-get (Debian 12, Ubuntu 24.04).
#   tools/setup.sh          compiler, build tools, libraries
#   tools/setup.sh --ci     also what checks and fuzzing need: clang and its tools, zsh, mandoc
#   tools/setup.sh --cuda   also what building the CUDA backend needs (tools/setup_cuda.sh)
#   tools/setup.sh --dist   also what tools/dist.sh needs
#   tools/setup.sh --list   prints the packages and installs nothing
# Nothing missing: says so in one line and never calls apt-get.
set -eu
cd "$(dirname "$0")/.."

# package | the file or command whose presence says that it is there | what it is for
build_packages='
gcc           cmd:gcc                 C compiler
libc6-dev     inc:stdlib.h            C library headers
cmake         cmd:cmake               build configuration
ninja-build   cmd:ninja               build execution
pkg-config    cmd:pkg-config          finding libraries
libdnnl-dev   inc:dnnl.h              matrix products (oneDNN)
libjansson-dev pc:jansson             JSON
libyaml-dev   pc:yaml-0.1             YAML configuration files
libpcre2-dev  pc:libpcre2-8           regular expressions of tokenizers
libutf8proc-dev pc:libutf8proc        Unicode normalisation
libxxhash-dev pc:libxxhash            checksums
libopenmpi-dev cmd:mpicc              training over many ranks (MPI)
openmpi-bin   cmd:mpirun              starting them
libcmocka-dev pc:cmocka               tests
'
ci_packages='
clang         cmd:clang               second compiler, fuzzers
clang-format  cmd:clang-format        layout of the code
clang-tidy    cmd:clang-tidy          static checks
libclang-rt-dev clang:libclang_rt.fuzzer-* run-times of fuzzers and sanitizers
libomp-dev    clang:omp.h             OpenMP of clang
zsh           cmd:zsh                 its completion is tried
mandoc        cmd:mandoc              checks the manual page
'

cuda_packages='
g++           cmd:g++                 what nvcc compiles host code with
python3-venv  py:ensurepip            fetching nvcc where the system has none
'
dist_packages='
patchelf      cmd:patchelf            libraries that find one another wherever they are put
'
packages=$build_packages
list_only=0
cuda=no
for arg in "$@"; do
  case $arg in
  --ci) packages="$packages$ci_packages" ;;
  --cuda) packages="$packages$cuda_packages" cuda=yes ;;
  --dist) packages="$packages$dist_packages" ;;
  --list) list_only=1 ;;
  *) echo "usage: tools/setup.sh [--ci] [--cuda] [--dist] [--list]" >&2; exit 2 ;;
  esac
done

have() {
  case $1 in
  cmd:*) command -v "${1#cmd:}" >/dev/null 2>&1 ;;
  inc:*) # the compiler knows its own search path; before there is one, look where Debian puts it
    if command -v gcc >/dev/null 2>&1; then
      echo "#include <${1#inc:}>" | gcc -E -x c - >/dev/null 2>&1
    else
      test -e "/usr/include/${1#inc:}"
    fi ;;
  pc:*) command -v pkg-config >/dev/null 2>&1 && pkg-config --exists "${1#pc:}" ;;
  py:*) command -v python3 >/dev/null 2>&1 && python3 -c "import ${1#py:}" 2>/dev/null ;;
  clang:*) command -v clang >/dev/null 2>&1 &&
    find "$(clang -print-resource-dir)/" -name "${1#clang:}" 2>/dev/null | grep -q . ;;
  esac
}

missing=''
why=''
# Without pkg-config nothing can be said of the libraries: they are then named too, and apt-get
# leaves alone what is there.
while read -r name test_for purpose; do
  [ -n "$name" ] || continue
  if [ "$list_only" = 1 ]; then
    printf '%-20s %s\n' "$name" "$purpose"
  elif ! have "$test_for"; then
    missing="$missing $name"
    why="$why$(printf '  %-20s %s' "$name" "$purpose")
"
  fi
done <<LIST
$packages
LIST
[ "$list_only" = 0 ] || exit 0

set_up_cuda() {
  [ $cuda = no ] || tools/setup_cuda.sh
}
if [ -z "$missing" ]; then
  echo "set-up: everything is there"
  set_up_cuda
  exit 0
fi
printf 'set-up: missing packages\n%s' "$why"

if ! command -v apt-get >/dev/null 2>&1; then
  echo "set-up: this system has no apt-get. Install its packages of these libraries and tools by" >&2
  echo "hand (the names above are Debian's), then run make again." >&2
  exit 1
fi
root=''
if [ "$(id -u)" != 0 ]; then
  if ! command -v sudo >/dev/null 2>&1; then
    echo "set-up: not root, and there is no sudo. As root, run:" >&2
    echo "  apt-get install --no-install-recommends$missing" >&2
    exit 1
  fi
  root=sudo
fi
echo "set-up: installing them with apt-get${root:+ (through sudo)}"
# Fresh lists first: a new machine has none, an old one names versions that are gone.
install() {
  # shellcheck disable=SC2086 # a list of words
  $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing \
    </dev/null
}
$root apt-get update -q </dev/null
install || {
  echo "set-up: apt-get could not install:$missing" >&2
  exit 1
}
echo "set-up: done"
set_up_cuda
