#!/usr/bin/env bash
# A Llama-like model of 7B parameters with early exits at the start of the second and third of four stages.
# bash examples/ee_training/7B.sh --help says which variables it reads.
set -euo pipefail

TP="${TP:-1}" PP="${PP:-4}" MICRO_BATCH="${MICRO_BATCH:-2}"
ITERATIONS=192000 # of 4.2M tokens each: 800 billion
MODEL=(
    --num-layers 32 --hidden-size 4096 --num-attention-heads 32
    --exit-layer-nums 9 17 --pre-exit --exit-layer-weight 0.1 0.2
    --untie-embeddings-and-output-weights --untie-exit-output-weights
)
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
