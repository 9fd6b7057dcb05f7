#!/bin/sh
# Trains for a while on the CPU with evaluations, samples, checkpoints and reports on, watches what
# the process holds, and fails when any of it grows.
#   tools/soak.sh SECONDS DIR [MOETUNE] [-- more options of `moetune train`]
# MOETUNE: a path, from the source's root where it is relative (build/release/moetune). DIR: made anew; DIR/samples.tsv keeps what was seen every EVERY (10) seconds.
# SOAK_LIMIT: KiB/hour that anonymous memory may grow by (1024).
set -eu
seconds=$1 dir=$2
shift 2
case $dir in
/*) ;;
*) dir=$PWD/$dir ;;
esac
cd "$(dirname "$0")/.."
moetune=build/release/moetune
if [ $# -gt 0 ] && [ "$1" != -- ]; then
  moetune=$1
  shift
fi
[ "${1:-}" != -- ] || shift
every=${EVERY:-10} limit=${SOAK_LIMIT:-1024}
mkdir "$dir"
head -n 24 data/jargon.eval.jsonl >"$dir/eval.jsonl"

"$moetune" train --model models/tiny --data data/jargon.train.jsonl --eval-data "$dir/eval.jsonl" --out "$dir/run" \
  --cache-dir "$dir/cache" --device cpu --threads 1 --batch-size 4 --max-seq-length 128 --epochs 1000000 --lr 1e-5 \
  --lr-schedule constant --eval-every 250 --save-every 250 --keep-last 2 --keep-best --samples 2 --sample-tokens 16 \
  --tensorboard --log-every 100 "$@" >"$dir/out.txt" 2>"$dir/log.txt" </dev/null &
pid=$!
trap 'kill "$pid" 2>/dev/null || :' EXIT

# seconds, anonymous and all resident KiB, descriptors, threads, KiB and entries below the run.
sample() {
  status=$(cat "/proc/$pid/status" 2>/dev/null) || return 0
  descriptors=$(find "/proc/$pid/fd" -mindepth 1 2>/dev/null | wc -l)
  disk=$(du -sk "$dir/run" 2>/dev/null | cut -f 1) || :
  entries=$(find "$dir/run" -mindepth 1 2>/dev/null | wc -l)
  printf '%s\n' "$status" | awk -v at="$(($(date +%s) - begin))" -v fd="$descriptors" -v disk="$disk" -v entries="$entries" '
    /^RssAnon:/ { anon = $2 }
    /^VmRSS:/ { rss = $2 }
    /^Threads:/ { threads = $2 }
    END { if (rss) printf "%d\t%d\t%d\t%d\t%d\t%d\t%d\n", at, anon, rss, fd, threads, disk, entries }'
}

begin=$(date +%s)
printf 'seconds\tanon_kib\trss_kib\tdescriptors\tthreads\tdisk_kib\tentries\n' >"$dir/samples.tsv"
while [ $(($(date +%s) - begin)) -lt "$seconds" ]; do
  sleep "$every"
  kill -0 "$pid" 2>/dev/null || { cat "$dir/log.txt" >&2; echo "soak: the run ended by itself" >&2; exit 1; }
  sample >>"$dir/samples.tsv"
done
kill -TERM "$pid"
ended=0
wait "$pid" || ended=$?
trap - EXIT
steps=$(grep -c '"loss"' "$dir/run/metrics.jsonl" || :)
echo "steps $steps, status after SIGTERM $ended"

# What a save or an evaluation holds for a moment comes and goes: the least value of each window
# counts, and a leak lifts it. A tenth of the time is warm-up.
awk -F '\t' -v seconds="$seconds" -v limit="$limit" -v ended="$ended" -v steps="$steps" '
  function slope(y, n,   i, sx, sy, sxx, sxy) {
    for (i = 1; i <= n; i++) { sx += x[i]; sy += y[i]; sxx += x[i] * x[i]; sxy += x[i] * y[i] }
    return 3600 * (n * sxy - sx * sy) / (n * sxx - sx * sx)
  }
  function least(y, from, to,   i, m) {
    m = y[from]
    for (i = from; i <= to; i++) if (y[i] < m) m = y[i]
    return m
  }
  function flat(name, y, n,   a, b) { # the least of the last third is not above that of the first
    a = least(y, 1, int(n / 3)); b = least(y, n - int(n / 3) + 1, n)
    printf "%s flat: %s (least %d, then %d)\n", name, (b > a ? "no" : "yes"), a, b
    if (b > a) bad = 1
  }
  NR > 1 && $1 >= seconds / 10 {
    n++
    x[n] = $1; anon[n] = $2; rss[n] = $3; fd[n] = $4; threads[n] = $5; disk[n] = $6; entries[n] = $7
  }
  END {
    if (n < 12) { print "soak: too few samples" > "/dev/stderr"; exit 1 }
    all = slope(anon, n); resident = slope(rss, n); growth = slope(disk, n)
    windows = n < 180 ? 12 : 60
    for (w = 0; w < windows; w++) {
      from = 1 + int(w * n / windows); to = int((w + 1) * n / windows)
      low[w + 1] = least(anon, from, to); mid[w + 1] = (x[from] + x[to]) / 2
    }
    for (w = 1; w <= windows; w++) x[w] = mid[w]
    base = slope(low, windows)
    printf "samples %d over %d s\n", n, seconds
    printf "anonymous memory: %.1f KiB/hour over the least of %d windows; %.1f over all samples; from %d to %d KiB\n",
           base, windows, all, low[1], low[windows]
    printf "resident memory: %.1f KiB/hour over all samples\n", resident
    printf "disk of the run: %.1f KiB/hour\n", growth
    flat("descriptors", fd, n); flat("threads", threads, n); flat("entries of the run", entries, n)
    if (base > limit) { printf "memory grows by more than %d KiB/hour\n", limit; bad = 1 }
    if (ended != 0 || steps < 1) bad = 1
    exit bad
  }' "$dir/samples.tsv"
