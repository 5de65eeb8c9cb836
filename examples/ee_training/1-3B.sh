#!/usr/bin/env bash
# A Llama-like model of 1.3B parameters with early exits at the start of the second and third of four stages.
# bash examples/ee_training/1-3B.sh --help says which variables it reads.
set -euo pipefail

TP="${TP:-1}" PP="${PP:-4}" MICRO_BATCH="${MICRO_BATCH:-4}"
ITERATIONS=72000 # of 4.2M tokens each: 300 billion
MODEL=(
    --num-layers 24 --hidden-size 2048 --num-attention-heads 32
    --exit-layer-nums 7 13 --pre-exit --exit-layer-weight 0.25 0.5
)
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
