#!/usr/bin/env bash
# A Llama-like model of 30B parameters with early exits at the start of the second and third of four stages.
# bash examples/ee_training/30B.sh --help says which variables it reads.
set -euo pipefail

TP="${TP:-4}" PP="${PP:-4}" MICRO_BATCH="${MICRO_BATCH:-1}"
ITERATIONS=192000 # of 4.2M tokens each: 800 billion
MODEL=(
    --num-layers 60 --hidden-size 6656 --num-attention-heads 52
    --exit-layer-nums 16 31 --pre-exit --exit-layer-weight 0.1 0.2
    --untie-embeddings-and-output-weights --untie-exit-output-weights
)
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
