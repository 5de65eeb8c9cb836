#!/usr/bin/env bash
# One exit on Llama 2 13B, behind a quarter of its layers: no more than that quarter is loaded.
# bash examples/ee_tuning/tune/llama2_13B_1_exit_mlp_pt.sh --help says which variables it reads.
set -euo pipefail

STAGES="${STAGES:-1}"
MODEL=(
    --num-layers 40 --hidden-size 5120 --num-attention-heads 40 --ffn-hidden-size 13824
    --exit-layer-nums 10
)
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
