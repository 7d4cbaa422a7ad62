#!/usr/bin/env bash
# From nothing to a trained DS-MoE, its sparse version and both scored beside dense models: about 25 minutes on two
# cores. Run it again after an interruption: finished parts are kept, training goes on from its last checkpoint. A folder
# is of one setting (settings.txt in it); with others, or with edited configs, it stops before it does anything.
#   QUICKSTART_DIR     where everything goes                (default runs/quickstart)
#   QUICKSTART_TOKENS  tokens that each model trains on     (default: the configs')
#   QUICKSTART_LIMIT   questions of each benchmark          (default 200)
#   DSMOE_CACHE        where downloaded wheels are kept     (default runs/cache)
set -euo pipefail
cd "$(dirname "$0")/.."
dir="${QUICKSTART_DIR:-runs/quickstart}"
cache="${DSMOE_CACHE:-runs/cache}"
limit="${QUICKSTART_LIMIT:-200}"
models=(dense dense-active dsmoe)

# what the finished parts depend on, a line each: name, value
settings() {
  echo "QUICKSTART_TOKENS ${QUICKSTART_TOKENS:-as in the configs}"
  echo "QUICKSTART_LIMIT $limit"
  for name in "${models[@]}"; do
    echo "configs/quickstart/$name.yaml checksum $(cksum < "configs/quickstart/$name.yaml" | cut -d' ' -f1)"
  done
}

# settings.txt is missing beside models of an older quickstart: of which settings those are isn't known
begun=""
for part in settings.txt "${models[@]}"; do [ ! -e "$dir/$part" ] || begun=yes; done
if [ -n "$begun" ]; then
  differs="$(settings | while read -r name value; do
    was="$(grep "^$name " "$dir/settings.txt" 2> /dev/null | cut -d' ' -f2-)" || was="not known"
    [ "$was" = "$value" ] || printf '%s' ", $name: $value, was $was"
  done)"
  if [ -n "$differs" ]; then
    echo "error: $dir holds parts of other settings (${differs#, });" \
      "set QUICKSTART_DIR to another folder, or remove this one" >&2
    exit 2
  fi
else
  mkdir -p "$dir"
  settings > "$dir/settings.txt"
fi
source train/environment.sh ""

echo "== text and benchmarks"
[ -f "$dir/text.jsonl.gz" ] || dsmoe data text --cache "$cache" --output "$dir/text.jsonl.gz"
[ -f "$dir/data/meta.json" ] || dsmoe data prepare --source "demonstration=$dir/text.jsonl.gz" \
  --train-tokenizer 512 --validation-fraction 0.01 --output "$dir/data"
[ -f "$dir/benchmarks/benchmarks.json" ] || dsmoe data benchmarks --cache "$cache" --output "$dir/benchmarks"

echo "== training"
for name in "${models[@]}"; do
  [ -f "$dir/$name/summary.json" ] || accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no \
    --dynamo_backend no --num_cpu_threads_per_process "$(getconf _NPROCESSORS_ONLN)" train/pretrain.py --config "configs/quickstart/$name.yaml" \
    --data.path "$dir/data" --train.output_dir "$dir/$name" --train.resume true \
    ${QUICKSTART_TOKENS:+--train.total_tokens "$QUICKSTART_TOKENS"}
done

echo "== sparsify (the threshold is chosen on training text)"
# where there is none, or the model was trained again since
if [ "$dir/dsmoe/summary.json" -nt "$dir/dsmoe-sparse/sparsity.json" ]; then
  dsmoe sparsify "$dir/dsmoe" --policy threshold --target-active 0.33 --data "$dir/data" --split train \
    --max-tokens 30000 --output "$dir/dsmoe-sparse" --overwrite
fi

echo "== score"
python eval/score.py --model "dense=$dir/dense/final" --model "dense-active=$dir/dense-active/final" \
  --model "dsmoe=$dir/dsmoe/final" --model "dsmoe-sparse=$dir/dsmoe-sparse" --tasks paper --limit "$limit" \
  --include-path "$dir/benchmarks" --data "$dir/data" --data-tokens 40000 --sequence-length 256 --decode-speed --resume \
  --output "$dir/scores.json" > "$dir/score.log"
python eval/report_quickstart.py "$dir"
