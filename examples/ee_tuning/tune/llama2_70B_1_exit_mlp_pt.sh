#!/usr/bin/env bash
# One exit on Llama 2 70B, behind a quarter of its layers: no more than that quarter is loaded.
# bash examples/ee_tuning/tune/llama2_70B_1_exit_mlp_pt.sh --help says which variables it reads.
set -euo pipefail

STAGES="${STAGES:-1}"
MODEL=(
    --num-layers 80 --hidden-size 8192 --num-attention-heads 64 --ffn-hidden-size 28672
    --group-query-attention --num-query-groups 8
    --exit-layer-nums 20
)
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
