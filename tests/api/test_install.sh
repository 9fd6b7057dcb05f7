#!/bin/sh
# What is installed serves a program outside of this tree: staged under DESTDIR, compiled against with
# pkg-config, linked with either library, and run; the libraries show what the headers declare alone.
# Started in the build directory. CC, CMAKE, FLAGS, CUDA_LIB_DIR: of the build.
set -eu
here=$(cd "$(dirname "$0")/../.." && pwd)
: "${CC:=cc}" "${CMAKE:=cmake}" "${FLAGS:=}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "$*" >&2; exit 1; }

DESTDIR=$work/stage "$CMAKE" --install . --prefix /opt/moetune >"$work/log" || fail "$(cat "$work/log")"
root=$work/stage/opt/moetune
[ -x "$root/bin/moetune" ] || fail "no program in $root"
ls "$work/stage" | grep -qx opt && [ "$(ls "$work/stage")" = opt ] || fail "files outside of the prefix"
pc=$(find "$root" -name moetune.pc)
export PKG_CONFIG_PATH="$(dirname "$pc")"
libdir=$(pkg-config --variable=libdir moetune)

# Exported: exactly what the headers mark.
sed -n '/^#/d; /^MT_API/{:a; /(/!{N; ba}; s/(.*//; s/.*[ *]//; p}' "$root"/include/moetune/*.h |
  sort >"$work/declared"
[ "$(wc -l <"$work/declared")" -ge 15 ] || fail "only $(wc -l <"$work/declared") functions declared"
grep -vq '^mt_' "$work/declared" && fail "a public name without mt_"
nm -D --defined-only "$libdir/libmoetune.so" | awk '{ print $3 }' | sort >"$work/shared"
nm -g --defined-only "$libdir/libmoetune.a" | awk 'NF == 3 { print $3 }' | sort >"$work/static"
for kind in shared static; do
  # AddressSanitizer's own marks of objects
  sed '/^__odr_asan/d' "$work/$kind" >"$work/$kind.names"
  diff "$work/declared" "$work/$kind.names" >&2 || fail "the $kind library's names are not the headers'"
done

# The headers alone, as strict C99, C17 and C++.
for header in "$root"/include/moetune/*.h; do
  echo "#include <moetune/$(basename "$header")>" >"$work/one.c"
  for std in c99 c17; do
    $CC -std=$std -Wall -Wextra -Wpedantic -Werror -fsyntax-only -I"$root/include" "$work/one.c"
  done
  if command -v c++ >/dev/null 2>&1; then
    c++ -x c++ -std=c++17 -Wall -Wextra -Wpedantic -Werror -fsyntax-only -I"$root/include" "$work/one.c"
  fi
done

cd "$work"
# FLAGS and pkg-config's words are several.
for source in "$here"/examples/*.c; do
  name=$(basename "$source" .c)
  $CC -std=c17 -O1 $FLAGS "$source" -o "$name-shared" $(pkg-config --cflags --libs moetune) -lm
  static=$(pkg-config --static --cflags --libs moetune | sed 's/-lmoetune/-l:libmoetune.a/')
  $CC -std=c17 -O1 $FLAGS "$source" -o "$name-static" $static -lm
  readelf -d "$name-shared" | grep -q 'NEEDED.*libmoetune\.so' || fail "$name is not linked with the .so"
  readelf -d "$name-static" | grep -q 'NEEDED.*libmoetune' && fail "$name-static needs the .so"
done
# A static program finds cuBLASLt as any other does, where the loader looks.
export LD_LIBRARY_PATH="$libdir${CUDA_LIB_DIR:+:$CUDA_LIB_DIR}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

# A few steps lower the held-out loss, and the written checkpoint has it.
head -n 24 "$here/data/jargon.eval.jsonl" >held-out.jsonl
for kind in shared static; do
  ./finetune-$kind "$here/models/tiny" "$here/data/jargon.train.jsonl" held-out.jsonl out 12 >"$kind.txt" ||
    fail "finetune-$kind failed"
  [ -s out/model.safetensors ] && [ -s out/tokenizer.json ] || fail "no checkpoint"
  awk '/^held-out loss/ { loss[$4] = $3 } { last = $0 }
    END {
      fall = loss["before"] - loss["after"]
      drift = loss["after"] - loss["reopened"]
      ok = fall > 0.02 && drift * drift < 0.01 * 0.01 && loss["reopened"] > 0 && last != ""
      if (!ok) { printf "before %s after %s reopened %s\n", loss["before"], loss["after"], loss["reopened"]; exit 1 }
    }' "$kind.txt" || { cat "$kind.txt" >&2; fail "finetune-$kind did not learn"; }
done
for kind in shared static; do
  ./moe_layer-$kind cpu >layer-$kind.txt || { cat layer-$kind.txt >&2; fail "moe_layer-$kind failed"; }
  grep -qx "fused chains 1" layer-$kind.txt || fail "no fused chain"
  [ "$(grep -c ' error ' layer-$kind.txt)" = 8 ] || fail "not all gradients were checked"
done
cat layer-shared.txt
cmp shared.txt static.txt || fail "the two libraries' results differ"
cat shared.txt
status=0
./finetune-shared "$work/absent" x y z 2>err.txt || status=$?
[ $status = 1 ] && grep -q absent err.txt || fail "a missing model: status $status, $(cat err.txt)"
