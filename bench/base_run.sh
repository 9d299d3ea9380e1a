#!/usr/bin/env bash
# A real model on one GPU that is lent for minutes: BASE for some fifteen minutes, in calls of nine that go on from each
# other, with held-out perplexity about every minute; then GLUE's tasks, beside the same model without pretraining. OUT
# has to stay between the calls; what there is by then is in OUT/results.tar.gz after each.
#
#     python3 data.py prepare --corpus wiki/ books/ news/ --out PREPARED     # beforehand, on any machine
#     bench/base_run.sh PREPARED GLUE OUT [FLAG...]                          # until it says that all is done
#
# FLAG...: of train.py, as at its smallest: --preset tiny --max-steps 20 --warmup-steps 2
# BASE_TASKS="sst-2:SST-2 qnli:QNLI mnli:MNLI"    task and folder of each
set -uo pipefail
[ $# -ge 3 ] || { echo "usage: bench/base_run.sh PREPARED GLUE OUT [FLAG...]" >&2; exit 2; }
prepared=$(realpath "$1") glue=$(realpath "$2") out=$(mkdir -p "$3/results" && cd "$3" && pwd) || exit 1
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shift 3
end=$((SECONDS + ${BENCH_SECONDS:-520}))
export TORCHINDUCTOR_CACHE_DIR="$out/.compiled"

pack() {
  for file in log.jsonl loss.png run.json results.json; do
    [ ! -e "$out/run/$file" ] || cp "$out/run/$file" "$out/results/"
  done
  tar -czf "$out/results.tar.gz" -C "$out" results
}
trap pack EXIT

once() {  # once NAME COMMAND...: unless it is done, runs a command for as long as there is time
  local name=$1 left=$((end - SECONDS)) code
  shift
  [ ! -e "$out/$name.done" ] || return 0
  [ $left -gt 90 ] || { echo "no time left for $name; the same command goes on" >&2; exit 3; }
  timeout --signal=TERM --kill-after=60 $left "$@"
  code=$?
  case $code in
    0) touch "$out/$name.done" ;;
    124 | 137 | 143) echo "$name was cut off; the same command goes on" >&2; exit 3 ;;
    *) echo "$name ended with $code" >&2; exit 1 ;;
  esac
}

# CHOICE: in minutes a model gains most from many steps, so the batch is small for BASE, and sequences of 128 tokens
# make attention cheap. At 400,000 tokens a second these are 330 million tokens in 14 minutes.
once pretraining python3 train.py --preset base --data "$prepared" --out "$out/run" --batch-size 256 --seq-len 128 \
  --peak-lr 5e-4 --max-steps 10000 --warmup-steps 1000 --eval-interval 700 --checkpoint-interval 3500 "$@"
for task in ${BASE_TASKS:-sst-2:SST-2 qnli:QNLI mnli:MNLI}; do
  for start in pretrained scratch; do
    name=${task%:*}-$start
    flags=(--task "${task%:*}" --data "$glue/${task#*:}" --model "$out/run" --out "$out/$name" --epochs 3)
    [ $start = pretrained ] || flags+=(--scratch)
    once "$name" python3 finetune.py "${flags[@]}"
    cp "$out/$name/results.json" "$out/results/$name.json"
  done
done
echo "all is done; results in $out/results.tar.gz"
