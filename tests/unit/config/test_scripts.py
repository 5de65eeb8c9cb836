"""EE-LLM's example scripts: their flags make a valid config; those of tuning are refused for now."""

import pytest

from megatron.config.fields import by_name
from megatron.config.load import load

_BLEND = " ".join(
    f"{weight} data/{name}_text_document"
    for name, weight in (
        *(("arxiv", ".0362"), ("books", ".0657"), ("c4", ".2264"), ("cc", ".4491"), ("stackexchange", ".0246")),
        *(("code", ".0810"), ("wikipedia", ".0548"), ("europarl", ".0010"), ("freelaw", ".0162")),
        *(("hackernews", ".0006"), ("nih", ".0005"), ("philpaper", ".0006"), ("pubmed_abstract", ".0065")),
        *(("pubmed_central", ".0318"), ("uspto", ".0050")),
    )
)
_LLAMA = "--normalization RMSNorm --position-embedding-type rope --swiglu --disable-bias-linear --use-flash-attn"
_TRAINING = f"""
--seq-length 2048 --max-position-embeddings 2048 --global-batch-size 2048 --lr 3e-4 --min-lr 3e-5
--lr-decay-style cosine --lr-warmup-iters 2000 --weight-decay 1e-1 --adam-beta1 0.9 --adam-beta2 0.95
--init-method-std 0.01 --clip-grad 1.0 --bf16 {_LLAMA} --sequence-parallel --pre-exit
--tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --data-path {_BLEND} --split 990,9,1
--log-interval 2 --save-interval 2400 --eval-interval 1200 --eval-iters 10 --save checkpoints --load checkpoints
--wandb-project p --wandb-group g --wandb-exp-name e --timing-log-option all --timing-log-level 0
--log-timers-to-tracker --log-batch-size-to-tracker --distributed-backend nccl --use-cpu-initialization
--no-async-tensor-model-parallel-allreduce
"""
_TUNING = f"""
--seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 4 --global-batch-size 16 --train-iters 40000
--lr 1e-4 --min-lr 1e-5 --lr-decay-style linear --lr-warmup-fraction 0.01 --adam-beta1 0.9 --adam-beta2 0.95
--adam-eps 1e-5 --clip-grad 1.0 --bf16 {_LLAMA} --use-exit-norm --use-exit-mlp --padded-vocab-size 32000
--untie-embeddings-and-output-weights --untie-exit-output-weights --finetune --load converted --save tuned
--save-interval 20000 --eval-iters 1 --log-interval 10 --tokenizer-type Llama2Tokenizer
--tokenizer-model tokenizer.model --data-path {_BLEND} --split 990,9,1 --no-load-optim --no-load-rng
"""
_UNTIED = "--untie-embeddings-and-output-weights --untie-exit-output-weights"

# name: (flags, tp, pp); last, what the config is to say.
PRETRAINING = {
    "1-3B": (
        "--num-layers 24 --hidden-size 2048 --num-attention-heads 32 --micro-batch-size 4 --train-iters 72000 "
        "--exit-layer-nums 7 13 --exit-layer-weight 0.25 0.5",
        *(1, 4),
    ),
    "7B": (
        "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --micro-batch-size 2 --train-iters 192000 "
        f"--exit-layer-nums 9 17 --exit-layer-weight 0.1 0.2 {_UNTIED}",
        *(1, 4),
    ),
    "13B": (
        "--num-layers 40 --hidden-size 5120 --num-attention-heads 40 --micro-batch-size 1 --train-iters 192000 "
        f"--exit-layer-nums 11 21 --exit-layer-weight 0.1 0.2 {_UNTIED}",
        *(2, 4),
    ),
    "30B": (
        "--num-layers 60 --hidden-size 6656 --num-attention-heads 52 --micro-batch-size 1 --train-iters 192000 "
        f"--exit-layer-nums 16 31 --exit-layer-weight 0.1 0.2 {_UNTIED}",
        *(4, 4),
    ),
}
_13B = "--num-layers 40 --hidden-size 5120 --num-attention-heads 40 --ffn-hidden-size 13824 --query-key-layer-scaling"
_70B = (
    "--num-layers 80 --hidden-size 8192 --num-attention-heads 64 --ffn-hidden-size 28672 --group-query-attention "
    "--num-query-groups 8 --sequence-parallel"
)
TUNING = {
    "llama2_13B_1_exit_mlp_pt": (f"{_13B} --exit-layer-nums 10", 4),
    "llama2_13B_8_exit_mlp_pt": (f"{_13B} --exit-layer-nums 5 10 15 20 25 30 35 40", 4),
    "llama2_70B_1_exit_mlp_pt": (f"{_70B} --exit-layer-nums 20", 1),
    "llama2_70B_8_exit_mlp_pt": (f"{_70B} --exit-layer-nums 10 20 30 40 50 60 70 80", 4),
}


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_script(name: str) -> None:
    flags, tp, pp = PRETRAINING[name]
    argv = f"{_TRAINING} {flags}".split()
    config = load(argv).config
    assert len(config.exits.exit_layer_nums) == len(config.exits.exit_layer_weight) == 2
    assert config.model.ffn_size == {2048: 5440, 4096: 10880, 5120: 13632, 6656: 17728}[config.model.hidden_size]
    sizes = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    parallel = load([*argv, *sizes]).config.parallel
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (tp, pp)
    assert parallel.sequence_parallel


@pytest.mark.parametrize("name", TUNING)
def test_tuning_script(name: str) -> None:
    flags, stages = TUNING[name]
    argv = f"{_TUNING} {flags}".split()
    config = load(argv).config
    assert config.exits.exit_norm == "own"
    assert config.model.padded_vocab_size == 32000
    extra = ["--tune-exit", "--tune-exit-pipeline-parallel-size", str(stages)]
    parallel = load([*argv, *extra, "--pipeline-model-parallel-size", "4"]).config.parallel
    assert parallel.tune_exit
    assert parallel.pipeline_ranks == stages


def test_inference_script() -> None:
    line = (
        "--use-checkpoint-args --tokenizer-type SentencePieceTokenizer --tokenizer-model t --load c --load-iteration 0"
    )
    loaded = load(line.split())
    assert loaded.config.checkpoint.use_checkpoint_args
    assert by_name()["load_iteration"].default == loaded.config.checkpoint.load_iteration == 0
