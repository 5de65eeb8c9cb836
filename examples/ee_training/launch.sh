# What the scripts beside this one share: `source`d by them after they have set MODEL, ITERATIONS and their defaults.
#
# Environment variables:
#
#   DATA_PATH         prefix of a .bin/.idx pair, or a blend: "0.7 data/web_text_document 0.3 data/code_text_document"
#   TOKENIZER_PATH    SentencePiece model that made the data
#   CHECKPOINT_PATH   directory for checkpoints and metrics; a run that finds its own there goes on
#   TP, PP            tensor and pipeline parallel sizes; TP=1 PP=1 takes one GPU
#   MICRO_BATCH       sequences of a forward pass
#   GLOBAL_BATCH      sequences of a step                       (default: 2048)
#   GPUS_PER_NODE     (default: those of this machine, else 8)
#   NNODES            (default: as many as one replica of the model needs)
#   NODE_RANK, MASTER_ADDR, MASTER_PORT                         this node's number and the first node, for several nodes
#   DRY_RUN=1         only check the flags and say memory and time, for DEVICE (default: the GPU found, else A100-80GB)
#
# Further words are flags of pretrain_early_exit_gpt.py and overrule those here: bash examples/ee_training/7B.sh --seed 7

case "${1:-}" in
    -h | --help)
        echo "bash examples/ee_training/$(basename "$0") [FLAG ...]"
        sed -n '3,/^case /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/launch_common.sh
GLOBAL_BATCH="${GLOBAL_BATCH:-2048}"
for name in TP PP MICRO_BATCH GLOBAL_BATCH GPUS_PER_NODE; do whole "$name"; done
NNODES="${NNODES:-$(((TP * PP + GPUS_PER_NODE - 1) / GPUS_PER_NODE))}"
whole NNODES

FLAGS=(
    "${MODEL[@]}"
    --seq-length 2048 --max-position-embeddings 2048 --init-method-std 0.01
    --normalization RMSNorm --swiglu --use-rotary-position-embeddings --disable-bias-linear
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
    --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH" --train-iters "$ITERATIONS"
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2000
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --bf16
)
[ "$TP" -eq 1 ] || FLAGS+=(--sequence-parallel)

if [ "${DRY_RUN:-0}" = 1 ]; then
    if [ -n "${TOKENIZER_PATH:-}" ]; then
        FLAGS+=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER_PATH")
    else
        FLAGS+=(--padded-vocab-size 32000)
    fi
    [ -z "${DEVICE:-}" ] || FLAGS+=(--device "$DEVICE")
    WORLD_SIZE=$((NNODES * GPUS_PER_NODE)) exec "$PYTHON" pretrain_early_exit_gpt.py "${FLAGS[@]}" --dry-run "$@"
fi

needs DATA_PATH "give the prefix of what tools/preprocess_data.py wrote, or a blend of several"
needs TOKENIZER_PATH "give the SentencePiece model that made the data"
needs CHECKPOINT_PATH "give a directory for checkpoints"
read -r -a DATA <<<"$DATA_PATH"
FLAGS+=(
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER_PATH"
    --data-path "${DATA[@]}" --split 990,9,1
    --save "$CHECKPOINT_PATH" --load "$CHECKPOINT_PATH" --save-interval 2400
    --eval-interval 1200 --eval-iters 10 --log-interval 2 --metrics-file "$CHECKPOINT_PATH/metrics.jsonl"
)
TORCHRUN=(-m torch.distributed.run --nproc-per-node "$GPUS_PER_NODE" --nnodes "$NNODES")
if [ "$NNODES" -gt 1 ]; then
    needs MASTER_ADDR "with NNODES=$NNODES every node has to know the first one"
    needs NODE_RANK "with NNODES=$NNODES every node has a number from 0"
    TORCHRUN+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
    TORCHRUN+=(--standalone)
fi
exec "$PYTHON" "${TORCHRUN[@]}" pretrain_early_exit_gpt.py "${FLAGS[@]}" "$@"
