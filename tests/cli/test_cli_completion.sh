#!/bin/sh
# Completion scripts and the manual page, as shells and man read them. Runs in the build's directory.
set -eu
command -v bash >/dev/null || { echo "no bash"; exit 77; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
failures=0
bad() {
  echo "FAILED: $1" >&2
  failures=$((failures + 1))
}

./moetune completion bash >"$dir/moetune.bash"
./moetune completion zsh >"$dir/_moetune"
./moetune man >"$dir/moetune.1"
mkdir -p "$dir/data/sub dir"
: >"$dir/data/some file.jsonl"

bash -n "$dir/moetune.bash" || bad "bash does not parse its script"
[ -z "$(bash "$dir/moetune.bash" 2>&1)" ] || bad "the script says something when it is read"

# complete WORD... : what bash makes of a line whose last word is being typed.
cat >"$dir/complete.bash" <<'BASH'
source "$1/moetune.bash"
cd "$1/data"
shift
[[ $(complete -p moetune) == *_moetune* ]] || echo "not registered"
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_moetune
printf '%s\n' "${COMPREPLY[@]}"
BASH
check() { # check WANTED WORD...
  wanted=$1
  shift
  got=$(bash --norc "$dir/complete.bash" "$dir" "$@" 2>&1 | sort | paste -sd' ')
  wanted=$(printf '%s\n' "$wanted" | tr '|' '\n' | sort | paste -sd' ')
  [ "$got" = "$wanted" ] || bad "'$*' gives '$got', not '$wanted'"
}
# WANTED's words are divided by |.
check 'train' moetune tr
check 'train|eval|generate|report|convert|inspect|plan|bench|ladder|completion|man|help' moetune ''
check '--help|--version' moetune -
check 'inspect' moetune help ins
check '--experts' moetune train --exp
check '--no-cache --no-report' moetune train --no-
check 'loop|grouped|fused' moetune train --experts ''
check 'grouped' moetune train --model x --experts g
check 'grouped' moetune train --experts = g
check 'loop|grouped|fused' moetune train --experts =
check 'sub dir' moetune train --out ''
check 'some file.jsonl|sub dir' moetune train --data s
check 'some file.jsonl|sub dir' moetune inspect ''
check '' moetune train --lr ''
check 'bash|zsh' moetune completion ''
check '' moetune nonsense ''

# Every option of every page is completed.
for command in train eval generate report convert inspect plan bench ladder completion man; do
  want=$(./moetune help $command |
    awk '/^      [^ ]/ && flag { print flag } { flag = /^  --[a-z]/ ? $1 : "" }')
  check "$(echo "$want" | paste -sd'|')" moetune $command --
  for flag in $want; do
    name=$(echo "$flag" | sed 's/-/\\\\-/g')
    grep -q -- "$name" "$dir/moetune.1" || bad "the manual page lacks $flag of $command"
    grep -q -- "'[*]*$flag[=[]" "$dir/_moetune" || bad "zsh lacks $flag of $command"
  done
done

# An interactive bash, through its own machinery.
if command -v script >/dev/null; then
  { echo "source $dir/moetune.bash"; sleep 0.5; printf 'moetune eval --mod\t'; sleep 0.5
    printf '\025exit\n'; } |
    env -i PATH="$PATH" TERM=dumb HOME="$dir" INPUTRC=/dev/null \
      timeout 20 script -qec 'bash --norc --noprofile -i' /dev/null >"$dir/typed" 2>&1 || true
  grep -q 'eval --model' "$dir/typed" || bad "an interactive bash does not complete --model: $(cat "$dir/typed")"
elif [ -n "${CI:-}" ]; then
  bad "script is not there"
fi

if command -v zsh >/dev/null; then
  zsh -n "$dir/_moetune" || bad "zsh does not parse its script"
  cat >"$dir/complete.zsh" <<'ZSH'
zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z "PS1=; fpath=($1 \$fpath); autoload -Uz compinit; compinit -u -D; bindkey '^I' list-choices"
zpty -w z 'print re""ady'
while zpty -r z line && [[ $line != *ready* ]]; do :; done
zpty -w -n z "moetune train --experts "$'\t'
for i in {1..50}; do
  sleep 0.1
  while zpty -r -t z part; do out+=$part; done
  [[ $out == *grouped*loop* ]] && break
done
zpty -d z
print -r -- "$out"
ZSH
  timeout 60 zsh -f "$dir/complete.zsh" "$dir" >"$dir/typed" 2>&1 || true
  grep -q 'grouped *loop' "$dir/typed" || bad "zsh does not complete --experts: $(cat "$dir/typed")"
elif [ -n "${CI:-}" ]; then
  bad "zsh is not there"
fi

if command -v man >/dev/null && command -v groff >/dev/null; then
  said=$(MANROFFOPT= man --warnings -l "$dir/moetune.1" 2>&1 >"$dir/page") || bad "man: $said"
  [ -z "$said" ] || bad "man: $said"
  grep -q 'moetune inspect train.jsonl' "$dir/page" || bad "the page lacks an example"
fi
if command -v mandoc >/dev/null; then
  status=0
  mandoc -Tlint -W warning "$dir/moetune.1" >"$dir/lint" 2>&1 || status=$?
  [ $status -le 2 ] || bad "mandoc ends with $status"
  said=$(sed '/missing date/d' "$dir/lint")
  [ -z "$said" ] || bad "mandoc: $said"
elif [ -n "${CI:-}" ]; then
  bad "mandoc is not there"
fi
[ $failures = 0 ] && echo "completion and manual page: fine"
