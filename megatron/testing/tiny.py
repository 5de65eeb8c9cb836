"""Toy configs, models and batches for tests and examples: small enough for milliseconds, complete in kind."""

from collections.abc import Sequence

import torch

from megatron.config.model import ExitConfig, ModelConfig
from megatron.config.parallel import ParallelConfig
from megatron.data.loader import Microbatch, make_microbatch
from megatron.exits.loss import LossTerms, Objective, Share
from megatron.exits.spec import FINAL
from megatron.model.gpt import GPT
from megatron.model.init import initialise
from megatron.model.partition import stages_of
from megatron.model.stage import HeadScore, Stage, TokenBatch, head_scores
from megatron.parallel.rng import DropoutStream
from megatron.schedule.actions import Pipeline
from megatron.schedule.execute import Plan, Step, run
from megatron.schedule.generate import GENERATORS

GPT_SHAPE = dict(num_layers=4, hidden_size=32, num_attention_heads=4, seq_length=16, init_method_std=0.1)
LLAMA_SHAPE = GPT_SHAPE | dict(
    normalization="RMSNorm",
    position_embedding_type="rope",
    swiglu=True,
    ffn_hidden_size=48,
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
    group_query_attention=True,
    num_query_groups=2,
)


def model_config(family: str = "gpt", dropout: float = 0.0, **changes: object) -> ModelConfig:
    """A toy `gpt` or `llama`; keyword arguments override its fields."""
    shape = LLAMA_SHAPE if family == "llama" else GPT_SHAPE
    return ModelConfig(**(shape | dict(attention_dropout=dropout, hidden_dropout=dropout) | changes))


def build_gpt(
    model: ModelConfig,
    exits: ExitConfig | None = None,
    vocab_size: int = 60,
    padded_vocab_size: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    num_stages: int = 1,
) -> GPT:
    """An initialised model with all its stages and gradient buffers, on the CPU. Norms and biases are perturbed too."""
    exits = exits or ExitConfig()
    stages = stages_of(model, exits, ParallelConfig(pipeline_model_parallel_size=num_stages))
    gpt = GPT(model, exits, stages, padded_vocab_size).to(dtype)
    initialise(gpt, seed, vocab_size)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gpt.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise, dtype=dtype)
            parameter.main_grad = torch.zeros_like(parameter)
            parameter.grad = parameter.main_grad
    return gpt


def random_batch(batch: int = 2, length: int = 16, vocab_size: int = 60, seed: int = 0, **flags: bool) -> Microbatch:
    """A microbatch of uniformly drawn tokens; token 0 plays the end of document. `flags` as of `make_microbatch`."""
    source = torch.Generator().manual_seed(seed)
    text = torch.randint(0, vocab_size, (batch, length + 1), generator=source)
    return make_microbatch(text, 0, **flags)


@torch.no_grad()
def evaluate_heads(model: GPT, batch: TokenBatch, vocab_size: int | None = None) -> dict[str, HeadScore]:
    """Scores of every head of a one-stage model on one batch, without dropout."""
    stage = Stage(model.eval(), vocab_size)
    heads = stage.score(stage.forward(batch, None), batch)
    return head_scores(heads, heads[FINAL].argmax, batch)


def accumulate(
    stage: Stage,
    batches: Sequence[TokenBatch],
    objective: Objective,
    streams: Sequence[DropoutStream | None] | None = None,
    kind: str = "1f1b",
) -> list[LossTerms]:
    """The gradients of a step on a one-stage model, as the mean over `batches`; returns their losses."""
    pipeline = Pipeline(1, len(batches), frozenset({0}))
    plan = Plan.of(GENERATORS[kind](pipeline))
    shares = Share(1 / len(batches), 1 / len(batches))
    step = Step({0: stage}, batches, streams or [None] * len(batches), objective, lambda stage, microbatch: shares)
    terms = run(plan, 0, step)
    return [terms[0, m] for m in range(len(batches))]
