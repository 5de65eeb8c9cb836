#!/usr/bin/env bash
# Bring a checkpoint in Megatron's format into another tensor- and pipeline-parallel layout:
#   LOAD_DIR=checkpoints/tp1pp4 SAVE_DIR=checkpoints/tp2pp2 TP=2 PP=2 bash tools/convert_parallelism.sh
# Further flags are those of tools/checkpoint/util.py.
set -euo pipefail

: "${LOAD_DIR:?the directory of the checkpoint to convert}" "${SAVE_DIR:?the directory that gets the converted one}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec python "$here/checkpoint/util.py" --model-type EarlyExitGPT --load-dir "$LOAD_DIR" --save-dir "$SAVE_DIR" \
    --target-tensor-parallel-size "${TP:-1}" --target-pipeline-parallel-size "${PP:-1}" "$@"
