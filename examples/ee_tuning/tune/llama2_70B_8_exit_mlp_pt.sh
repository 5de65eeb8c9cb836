#!/usr/bin/env bash
# Eight exits on Llama 2 70B.
# bash examples/ee_tuning/tune/llama2_70B_8_exit_mlp_pt.sh --help says which variables it reads.
set -euo pipefail

STAGES="${STAGES:-4}"
MODEL=(
    --num-layers 80 --hidden-size 8192 --num-attention-heads 64 --ffn-hidden-size 28672
    --group-query-attention --num-query-groups 8
    --exit-layer-nums 10 20 30 40 50 60 70 80
)
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
