#!/bin/sh
# The house rules that a compiler does not see. tools/check_layers.sh [SOURCE_ROOT]
#  1. Includes point down only; the table below says what each room may include.
#  2. CUDA's headers are included in kernels/cuda and the NCCL communicator alone.
#  3. Banned functions are not called; exit() belongs to cli/.
# Prints FILE:LINE: what is wrong, for each; exit status 1 when there is any.
set -eu
root=${1:-$(dirname "$0")/..}
cd "$root"
list=$(mktemp)
trap 'rm -f "$list"' EXIT
find src -type f \( -name '*.c' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) | sort >"$list"
[ -s "$list" ] || { echo "$root/src: no sources" >&2; exit 1; }
xargs awk '
BEGIN {
  # room: rooms it may include (its own always)
  down["base"] = ""
  down["backend"] = "base"
  down["kernels"] = "backend base"
  down["quant"] = "backend base"
  down["model"] = "quant backend base"
  down["io"] = "backend base"
  down["data"] = "backend base"
  down["hf"] = "io model quant backend base"
  down["par"] = "model quant backend base"
  down["train"] = "par hf data io model quant backend base"
  down["report"] = "train data base"
  down["api"] = "train par hf data io model quant backend base"
  down["cli"] = "report train par hf data io model quant backend base"
  # single headers beyond that
  door["train kernels/registry.h"] = door["cli kernels/registry.h"] = 1
  door["api kernels/registry.h"] = door["base moetune/error.h"] = 1
  split("strcpy strcat sprintf vsprintf gets atoi atol atof strtok alloca system popen tmpnam " \
        "mktemp abort", b, " ")
  for (i in b) banned[b[i]] = 1
}
FNR == 1 {
  split(FILENAME, part, "/")
  room = part[2]
  in_comment = 0
  if (!(room in down)) bad("room " room " is not in the table of tools/check_layers.sh")
}
/^[ \t]*#[ \t]*include[ \t]*"/ {
  target = $0
  sub(/^[^"]*"/, "", target)
  sub(/".*/, "", target)
  if (target ~ /\.\./) bad("include path climbs: " target)
  if (index(target, "/")) {
    other = target
    sub(/\/.*/, "", other)
    if (other == "moetune")
      other = room == "cli" || room == "api" ? room : "the public interface"
    allowed = other == room || (room " " target) in door ||
              index(" " down[room] " ", " " other " ")
    if (!allowed) bad(room " must not include " target)
  }
}
/^[ \t]*#[ \t]*include[ \t]*[<"](cuda|cublas|cudnn|nccl|cutlass|cub\/|nv)/ {
  if (FILENAME !~ /^src\/kernels\/cuda\// && FILENAME !~ /^src\/par\/nccl/)
    bad("CUDA header outside kernels/cuda")
}
{
  line = code($0)
  while (match(line, /[A-Za-z_][A-Za-z0-9_]*[ \t]*\(/)) {
    name = substr(line, RSTART, RLENGTH - 1)
    sub(/[ \t]+$/, "", name)
    if (name in banned) bad(name "() is banned")
    if ((name == "exit" || name == "_exit") && room != "cli") bad(name "() outside cli/")
    line = substr(line, RSTART + RLENGTH)
  }
}
# The line without comments and the insides of strings.
function code(s,    out, i, c, quote) {
  out = ""
  quote = ""
  for (i = 1; i <= length(s); i++) {
    c = substr(s, i, 1)
    if (in_comment) {
      if (substr(s, i, 2) == "*/") { in_comment = 0; i++ }
    } else if (quote != "") {
      if (c == "\\") i++
      else if (c == quote) quote = ""
    } else if (substr(s, i, 2) == "/*") { in_comment = 1; i++ }
    else if (substr(s, i, 2) == "//") break
    else if (c == "\"" || c == "\047") quote = c
    else out = out c
  }
  return out
}
function bad(what) {
  print FILENAME ":" FNR ": " what
  failures++
}
END { exit failures > 0 }
' <"$list"
