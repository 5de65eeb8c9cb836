#!/usr/bin/env bash
# Eight exits on Llama 2 13B.
# bash examples/ee_tuning/tune/llama2_13B_8_exit_mlp_pt.sh --help says which variables it reads.
set -euo pipefail

STAGES="${STAGES:-4}"
MODEL=(
    --num-layers 40 --hidden-size 5120 --num-attention-heads 40 --ffn-hidden-size 13824
    --exit-layer-nums 5 10 15 20 25 30 35 40
)
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
