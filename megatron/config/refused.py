"""Flags of Megatron-LM and EE-LLM that are no settings of ours: accepted without effect, or refused with a reason.

Together with the dataclass fields this covers every flag of EE-LLM; the parser, the flag reference and the tests
read the same tables. Values that a flag of ours does not take yet are listed here too.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Accepted:
    """A flag that asks for what always, or never, happens here. `values` it takes; `only` these if given."""

    flag: str
    why: str
    values: int = 0
    only: tuple[str, ...] = ()
    otherwise: str = ""


_ATTENTION = "attention goes through torch's fused kernels, softmax in fp32"
_FUSION = "torch.compile fuses where asked; otherwise plain kernels run"
_OVERLAP = "communication is ordered by our own schedule"
_LOGGED = "always logged"
_TIMING = "step time and throughput are always reported"
_EXPERTS = "mixture-of-experts layers are not there yet"
_CONTEXT = "context parallelism is not there yet; --sequence-parallel shards activations along the sequence"
_STREAMS = "random streams are derived from the seed: there is no state to save or load"
_ENGINE = "of Transformer Engine its fp8 products alone are used, with scales of their own: see --fp8-format"

ACCEPTED: tuple[Accepted, ...] = (
    Accepted("--use-flash-attn", _ATTENTION),
    Accepted("--no-masked-softmax-fusion", _ATTENTION),
    Accepted("--attention-softmax-in-fp32", _ATTENTION),
    Accepted("--query-key-layer-scaling", "the scaling cancels when the softmax is fp32, as ours is"),
    Accepted("--no-query-key-layer-scaling", "the scaling cancels when the softmax is fp32, as ours is"),
    Accepted("--no-bias-dropout-fusion", _FUSION),
    Accepted("--no-persist-layer-norm", _FUSION),
    Accepted("--no-gradient-accumulation-fusion", "autograd accumulates weight gradients"),
    Accepted("--accumulate-allreduce-grads-in-fp32", "gradients are always summed in fp32"),
    Accepted("--fp16-lm-cross-entropy", "losses are always summed in fp32"),
    Accepted("--use-mcore-models", "there is one model implementation"),
    Accepted("--transformer-impl", "there is one model implementation", 1, ("local",), _ENGINE),
    Accepted("--no-async-tensor-model-parallel-allreduce", _OVERLAP),
    Accepted("--overlap-p2p-communication", _OVERLAP),
    Accepted("--overlap-grad-reduce", _OVERLAP),
    Accepted("--no-delay-grad-reduce", _OVERLAP),
    Accepted("--no-scatter-gather-tensors-in-pipeline", _OVERLAP),
    Accepted("--use-ring-exchange-p2p", _OVERLAP),
    Accepted("--context-parallel-size", "1 means no context parallelism", 1, ("1",), _CONTEXT),
    Accepted("--expert-model-parallel-size", "1 means no expert parallelism", 1, ("1",), _EXPERTS),
    Accepted("--local-rank", "the launcher's environment says it", 1),
    Accepted("--local_rank", "the launcher's environment says it", 1),
    Accepted("--use-cpu-initialization", "initial values are the same on every device and layout"),
    Accepted("--no-initialization", "weights are drawn cheaply, then overwritten by --load"),
    Accepted("--no-save-rng", _STREAMS),
    Accepted("--no-load-rng", _STREAMS),
    Accepted("--exit-signal-handler", "SIGTERM and SIGINT always end in a checkpoint"),
    Accepted("--empty-unused-memory-level", "memory is left to torch's allocator", 1, ("0", "1", "2")),
    Accepted("--mmap-warmup", "the operating system caches data files"),
    Accepted("--inference-batch-times-seqlen-threshold", "training does not use it", 1),
    Accepted("--max-tokens-to-oom", "training does not use it", 1),
    Accepted("--timing-log-level", _TIMING, 1, ("0", "1", "2")),
    Accepted("--timing-log-option", _TIMING, 1, ("max", "minmax", "all")),
    Accepted("--no-barrier-with-level-1-timing", _TIMING),
    Accepted("--tensorboard-queue-size", "TensorBoard's own queue is used", 1),
    *(
        Accepted(f"--{what}-to-{where}", _LOGGED)
        for where in ("tracker", "tensorboard")
        for what in (
            "log-timers",
            "log-batch-size",
            "no-log-learnig-rate",
            "no-log-learning-rate",
            "no-log-loss-scale",
            "log-validation-ppl",
            "log-memory",
            "log-world-size",
        )
    ),
)

# Reason, then the flags it stands for.
_REFUSED: tuple[tuple[str, str], ...] = (
    ("the first stage has the embedding", "--standalone-embedding-stage"),
    ("recomputed activations are kept whole; use --sequence-parallel", "--distribute-saved-activations"),
    (
        "not in this version yet",
        "--tie-exit-output-weights",
    ),
    ("was replaced in Megatron-LM; use --micro-batch-size", "--batch-size"),
    ("was replaced in Megatron-LM; use --lr-warmup-fraction", "--warmup"),
    ("was replaced in Megatron-LM; use --tensor-model-parallel-size", "--model-parallel-size"),
    ("was replaced in Megatron-LM; use --recompute-activations", "--checkpoint-activations"),
    ("data-parallel ranks must start from the same weights", "--data-parallel-random-init"),
    (
        "residuals keep the dtype of the weights; train in fp32 without --bf16/--fp16 instead",
        "--fp32-residual-connection",
    ),
    (
        "runs are not profiled from inside; run the whole process under nsys or py-spy",
        "--profile --profile-step-start --profile-step-end --profile-ranks",
    ),
    ("layers are not built from external specs", "--model-spec"),
    ("ONNX export is not supported", "--onnx-safe"),
    ("process groups are always made by the run itself", "--lazy-mpu-init"),
    (_EXPERTS, "--num-experts --expert-parallel"),
    (_CONTEXT, "--cp-comm-type"),
    (
        _ENGINE,
        "--fp8-margin --fp8-interval --fp8-amax-history-len --fp8-amax-compute-algo "
        "--no-fp8-wgrad --allow-transformer-engine",
    ),
    (
        "encoder-decoder models (T5) are not supported",
        "--decoder-num-layers --decoder-seq-length --pipeline-model-parallel-split-rank",
    ),
    (
        "BERT models are not supported",
        "--bert-no-binary-head --bert-embedder-type --output-bert-embeddings --mask-prob --short-seq-prob "
        "--sample-rate",
    ),
    (
        "retrieval models (Retro) are not supported",
        "--retro-workdir --retro-add-retriever --retro-cyclic-train-iters --retro-encoder-layers "
        "--retro-encoder-hidden-dropout --retro-encoder-attention-dropout --retro-num-neighbors "
        "--retro-num-retrieved-chunks --retro-return-doc-ids",
    ),
    (
        "retrieval models (biencoder, ICT, REALM) are not supported",
        "--ict-head-size --biencoder-projection-dim --biencoder-shared-query-context-model --ict-load "
        "--bert-load --titles-data-path --query-in-block-prob --use-one-sent-docs --evidence-data-path "
        "--retriever-report-topk-accuracies --retriever-score-scaling --retriever-seq-length "
        "--block-data-path --embedding-path --indexer-batch-size --indexer-log-interval",
    ),
    (
        "vision models are not supported",
        "--num-classes --img-h --img-w --num-channels --patch-dim --classes-fraction "
        "--data-per-class-fraction --head-lr-mult --vision-pretraining --vision-pretraining-type "
        "--vision-backbone-type --swin-backbone-type --mask-type --mask-factor --iter-per-epoch "
        "--dino-local-img-size --dino-local-crops-number --dino-head-hidden-size --dino-bottleneck-size "
        "--dino-freeze-last-layer --dino-norm-last-layer --dino-warmup-teacher-temp --dino-teacher-temp "
        "--dino-warmup-teacher-temp-epochs",
    ),
    (
        "NVIDIA's internal autoresume is not supported; a run resumes with --load",
        "--adlr-autoresume --adlr-autoresume-interval",
    ),
)

# Values of our own flags that are known and not taken (flag, value) -> reason.
REFUSED_VALUES: dict[tuple[str, str], str] = {
    ("--tokenizer-type", "BertWordPieceLowerCase"): "BERT models are not supported",
    ("--tokenizer-type", "BertWordPieceCase"): "BERT models are not supported",
}

# Megatron's parsed attribute where it is not the flag's own name.
_ATTRIBUTES: dict[str, str] = {
    "--no-masked-softmax-fusion": "masked_softmax_fusion",
    "--query-key-layer-scaling": "apply_query_key_layer_scaling",
    "--no-query-key-layer-scaling": "apply_query_key_layer_scaling",
    "--no-bias-dropout-fusion": "bias_dropout_fusion",
    "--no-gradient-accumulation-fusion": "gradient_accumulation_fusion",
    "--no-async-tensor-model-parallel-allreduce": "async_tensor_model_parallel_allreduce",
    "--overlap-p2p-communication": "overlap_p2p_comm",
    "--no-delay-grad-reduce": "delay_grad_reduce",
    "--no-scatter-gather-tensors-in-pipeline": "scatter_gather_tensors_in_pipeline",
    "--no-initialization": "perform_initialization",
    "--no-barrier-with-level-1-timing": "barrier_with_L1_time",
    "--no-log-learnig-rate-to-tracker": "log_learning_rate_to_tracker",
    "--no-log-loss-scale-to-tracker": "log_loss_scale_to_tracker",
    "--no-fp8-wgrad": "fp8_wgrad",
    "--bert-no-binary-head": "bert_binary_head",
}


def accepted() -> dict[str, Accepted]:
    """Flags taken without effect, by name."""
    return {entry.flag: entry for entry in ACCEPTED}


def refused() -> dict[str, str]:
    """Flags known and not taken, with the reason."""
    return {flag: reason for reason, flags in _REFUSED for flag in flags.split()}


def attribute(flag: str) -> str:
    """Name of the parsed attribute that Megatron gives a flag of these tables."""
    return _ATTRIBUTES.get(flag, flag.removeprefix("--").replace("-", "_"))
