#!/usr/bin/env bash
# bench/ on one GPU that is lent for minutes: nine minutes a call, and the next call goes on. A part that has ended
# with 0 is done; one that has failed is left alone until its mark is removed. OUT has to stay between the calls. What
# there is by then is in OUT/results.tar.gz after every part, also if the call is cut off.
#
#     bench/gpu.sh OUT [PART...]         until it says that all is done
#     BENCH_QUICK=1 bench/gpu.sh OUT     everything at its smallest, on any machine: does it work?
#
# BENCH_CORPUS=books/:wiki.jsonl.xz      your text, else the documentation installed; copied to OUT
# BENCH_FLAGS="--seeds 1 --jobs 6"       of the studies, which with all their seeds take some hours
# BENCH_SECONDS=530                      of a call
# BENCH_COMMIT=1a2b3c4                   for the records, where git does not come along
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: bench/gpu.sh OUT [PART...]" >&2; exit 2; }
out=$(mkdir -p "$1/results" "$1/text" && cd "$1" && pwd) || exit 1
shift
parts=("$@")
[ $# -gt 0 ] || parts=(tiny base128 base512 rest train masking data_size batch_size text_encoding ladder input_format)
read -ra flags <<< "${BENCH_FLAGS:-}"
IFS=: read -ra texts <<< "${BENCH_CORPUS:-}"
for text in "${texts[@]}"; do  # a text that is copied anew for every call would count as another one
  cp -Rn "$text" "$out/text/" || exit 1
done
[ ${#texts[@]} -eq 0 ] || { flags+=(--corpus "$out/text"); export BENCH_CORPUS="$out/text"; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scale=gpu
[ -z "${BENCH_QUICK:-}" ] || scale=smoke
export TORCHINDUCTOR_CACHE_DIR="$out/.compiled"  # what is compiled for one part serves the next
end=$((SECONDS + ${BENCH_SECONDS:-530})) status=0 all="all is done; "

pack() {
  (shopt -s nullglob && cd "$out" && tar -czf .results.tmp results studies/*/*.json && mv .results.tmp results.tar.gz)
}
trap pack EXIT

for part in "${parts[@]}"; do
  mark="$out/$part-$scale"
  [ ! -e "$mark.done" ] && [ ! -e "$mark.failed" ] || continue
  file=model cases=
  case $part in  # a benchmark begins anew where it was cut off, so they come in pieces
    tiny) cases="pretraining_step and tiny" ;;
    base128) cases="pretraining_step and BASE and 128" ;;
    base512) cases="pretraining_step and 512" ;;
    rest) cases="not pretraining_step" ;;
    train) file=train cases="not two_ranks" ;;  # which runs on a CPU
  esac
  least=20 run=(python3 "bench/$part.py" --scale $scale --out "$out/studies" --results "$out/results" "${flags[@]}")
  if [ -n "$cases" ]; then
    least=150 run=(python3 -m pytest --benchmark-only "bench/bench_$file.py" -k "$cases"
                   --benchmark-json "$out/results/$part-$scale.json")
  fi
  left=$((end - SECONDS))
  [ $left -gt $least ] || { echo "no time left for $part; the same command goes on" >&2; all=; break; }
  # SIGINT, for a study then saves its runs; thirty seconds later it is too late for that.
  timeout --signal=INT --kill-after=30 $left "${run[@]}"
  code=$?
  case $code in
    0) touch "$mark.done"
       [ -z "$cases" ] ||
         python3 bench/report.py "$out/results/$part-$scale.json" > "$out/results/$part-$scale.md" ;;
    124 | 130 | 137) echo "$part was cut off; the same command goes on" >&2; all=; break ;;
    *) echo "$part ended with $code" >&2; touch "$mark.failed" ;;
  esac
  pack
done
for mark in "$out"/*.failed; do
  [ ! -e "$mark" ] || { echo "failed, and left alone until you remove it: $mark" >&2; all= status=1; }
done
echo "${all}done so far: $(cd "$out" && echo *.done); results in $out/results.tar.gz"
exit $status
