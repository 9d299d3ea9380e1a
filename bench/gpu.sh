#!/usr/bin/env bash
# bench/ on one GPU, nine minutes a call: the benchmarks, then the studies as far as there is time. Writes into the
# folder given; the next call goes on where this one ended.
#
#     bench/gpu.sh OUT [STUDY...]
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: bench/gpu.sh OUT [STUDY...]" >&2; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 1
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shift
studies=("$@")
[ $# -gt 0 ] || studies=(batch_size masking input_format text_encoding data_size ladder)
end=$((SECONDS + 530))

if [ ! -s "$out/benchmarks-gpu.json" ]; then
  # Of an interrupted session pytest-benchmark still writes what it has.
  timeout --signal=INT 300 pytest --benchmark-only --benchmark-json "$out/benchmarks-gpu.json" bench
fi
python bench/report.py "$out/benchmarks-gpu.json" > "$out/benchmarks-gpu.md"
for study in "${studies[@]}"; do
  left=$((end - SECONDS))
  [ $left -gt 20 ] || { echo "no time left for $study; the same command goes on" >&2; break; }
  timeout --signal=INT $left python "bench/$study.py" --scale gpu --out "$out/studies" --results "$out"
done
