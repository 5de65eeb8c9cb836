# What the scripts beside this one share: `source`d by them after they have set MODEL and their defaults.
#
# Environment variables:
#
#   DATA_PATH         prefix of a .bin/.idx pair, or a blend: "0.7 data/web_text_document 0.3 data/code_text_document"
#   TOKENIZER_PATH    the model's tokenizer: Llama 2's tokenizer.model, or a Hugging Face directory
#   LOAD_PATH         checkpoint with the exits added (examples/ee_tuning/convert/add_exit_layers.sh)
#   CHECKPOINT_PATH   directory for the tuned exits; a run that finds its own there goes on
#   TP, PP            tensor parallel size, and the pipeline stages of the whole model
#   STAGES            of these the first ones that are loaded and run: as many as the exits need
#   MICRO_BATCH, GLOBAL_BATCH                                   sequences of a forward pass, and of a step
#   GPUS_PER_NODE     (default: those of this machine, else 8)
#   DRY_RUN=1         only check the flags and say memory and time, for DEVICE (default: the GPU found, else A100-80GB)
#
# Further words are flags of pretrain_early_exit_gpt.py and overrule those here: --save-exits-only keeps the exits alone.

case "${1:-}" in
    -h | --help)
        echo "bash examples/ee_tuning/tune/$(basename "$0") [FLAG ...]"
        sed -n '3,/^case /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source examples/launch_common.sh
TP="${TP:-1}" PP="${PP:-4}" MICRO_BATCH="${MICRO_BATCH:-4}" GLOBAL_BATCH="${GLOBAL_BATCH:-16}"
for name in TP PP STAGES MICRO_BATCH GLOBAL_BATCH GPUS_PER_NODE; do whole "$name"; done
# of a step of 16 sequences no more ranks can have a microbatch each
RANKS=$((TP * STAGES * (GLOBAL_BATCH / MICRO_BATCH)))
[ "$GPUS_PER_NODE" -le "$RANKS" ] || GPUS_PER_NODE=$RANKS

FLAGS=(
    "${MODEL[@]}"
    --seq-length 2048 --max-position-embeddings 2048 --padded-vocab-size 32000
    --normalization RMSNorm --swiglu --use-rotary-position-embeddings --disable-bias-linear
    --untie-embeddings-and-output-weights --untie-exit-output-weights --use-exit-norm --use-exit-mlp
    --tune-exit --tune-exit-pipeline-parallel-size "$STAGES"
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
    --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH" --train-iters 40000
    --lr 1e-4 --min-lr 1e-5 --lr-decay-style linear --lr-warmup-fraction 0.01
    --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-5 --clip-grad 1.0 --bf16
)
[ "$TP" -eq 1 ] || FLAGS+=(--sequence-parallel)

if [ "${DRY_RUN:-0}" = 1 ]; then
    [ -z "${DEVICE:-}" ] || FLAGS+=(--device "$DEVICE")
    WORLD_SIZE=$GPUS_PER_NODE exec "$PYTHON" pretrain_early_exit_gpt.py "${FLAGS[@]}" --dry-run "$@"
fi

needs DATA_PATH "give the prefix of what tools/preprocess_data.py wrote, or a blend of several"
needs TOKENIZER_PATH "give the model's tokenizer"
needs LOAD_PATH "give the checkpoint with the exits added"
needs CHECKPOINT_PATH "give a directory for the tuned exits"
read -r -a DATA <<<"$DATA_PATH"
START=(--load "$LOAD_PATH" --finetune --no-load-optim --no-load-rng)
[ ! -e "$CHECKPOINT_PATH/latest_checkpointed_iteration.txt" ] || START=(--load "$CHECKPOINT_PATH" --backbone "$LOAD_PATH")
TYPE=Llama2Tokenizer
[ ! -d "$TOKENIZER_PATH" ] || TYPE=HuggingFaceTokenizer
FLAGS+=(
    --tokenizer-type "$TYPE" --tokenizer-model "$TOKENIZER_PATH" --data-path "${DATA[@]}" --split 990,9,1
    "${START[@]}" --save "$CHECKPOINT_PATH" --save-interval 20000
    --eval-interval 2000 --eval-iters 1 --log-interval 10 --metrics-file "$CHECKPOINT_PATH/metrics.jsonl"
)
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS_PER_NODE" \
    pretrain_early_exit_gpt.py "${FLAGS[@]}" "$@"
