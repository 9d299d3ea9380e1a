#!/usr/bin/env bash
# Everything in bench/ on one GPU, in under nine minutes: benchmarks, then as many of the studies as there is
# time for. Writes JSON, figures and readings to the folder given; a second call goes on with the studies.
#
#     bench/gpu.sh OUT [STUDY...]
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: bench/gpu.sh OUT [STUDY...]" >&2; exit 2; }
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
studies=("$@")
[ $# -gt 0 ] || studies=(batch_size masking input_format text_encoding data_size)
end=$((SECONDS + 530))

mkdir -p "$out/results"
timeout 300 pytest --benchmark-only --benchmark-json "$out/results/benchmarks-gpu.json" bench
for study in "${studies[@]}"; do
  left=$((end - SECONDS))
  [ $left -gt 20 ] || { echo "no time left for $study; run: bench/gpu.sh $out $study" >&2; continue; }
  timeout --signal=INT $left python "bench/$study.py" --scale gpu --out "$out/runs" --results "$out/results"
done
python bench/report.py --out "$out" "$out/results/benchmarks-gpu.json"
