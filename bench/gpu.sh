#!/usr/bin/env bash
# bench/ on one GPU that is lent for minutes: nine minutes a call, and the next call goes on. A part counts as done,
# and is not done again, once it has ended with 0. All results so far are in OUT/results.tar.gz after every call.
#
#     bench/gpu.sh OUT [PART...]         parts: model train batch_size masking input_format text_encoding data_size ladder
#     BENCH_QUICK=1 bench/gpu.sh OUT     everything at its smallest, on any machine: does it work?
#
# BENCH_CORPUS=books/:wiki.jsonl.xz      your text, else the documentation installed
# BENCH_SECONDS=530                      of a call
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: bench/gpu.sh OUT [PART...]" >&2; exit 2; }
out=$(mkdir -p "$1/results" && cd "$1" && pwd) || exit 1
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shift
parts=("$@")
[ $# -gt 0 ] || parts=(model train batch_size masking input_format text_encoding data_size ladder)
scale=gpu
[ -z "${BENCH_QUICK:-}" ] || scale=smoke
IFS=: read -ra corpus <<< "${BENCH_CORPUS:-}"
end=$((SECONDS + ${BENCH_SECONDS:-530})) status=0

for part in "${parts[@]}"; do
  [ ! -e "$out/$part.done" ] || continue
  left=$((end - SECONDS))
  [ $left -gt 20 ] || { echo "no time left for $part; the same command goes on" >&2; break; }
  case $part in
    # Benchmarks begin anew where they were cut off. What runs on a CPU alone is left out.
    model | train)
      part_command=(python3 -m pytest --benchmark-only "bench/bench_$part.py" -k "not two_ranks"
                    --benchmark-json "$out/results/$part-$scale.json") ;;
    *)
      part_command=(python3 "bench/$part.py" --scale $scale --out "$out/studies" --results "$out/results")
      [ ${#corpus[@]} -eq 0 ] || part_command+=(--corpus "${corpus[@]}") ;;
  esac
  # SIGINT, for a study then saves its runs; thirty seconds later it is too late for that.
  timeout --signal=INT --kill-after=30 $left "${part_command[@]}"
  code=$?
  case $code in
    0) touch "$out/$part.done" ;;
    124 | 130 | 137) echo "$part was cut off; the same command goes on" >&2 ;;
    *) echo "$part ended with $code" >&2; status=1 ;;
  esac
done
for part in model train; do
  [ ! -e "$out/$part.done" ] || python3 bench/report.py "$out/results/$part-$scale.json" > "$out/results/$part-$scale.md"
done
tar -czf "$out/results.tar.gz" -C "$out" results
echo "done so far: $(cd "$out" && echo *.done); results in $out/results.tar.gz"
exit $status
