"""A training step with 0 to 3 exits: its time against what the FLOPs predict, and against Hugging Face transformers.

On the CPU in fp32. Each contestant takes a step in turn; figures are medians of ratios within a round.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from report import Figure, alternate, arguments, finish, ratio

from megatron.config.model import ExitConfig, ModelConfig
from megatron.testing.step_memory import measure_in_fresh_process, training_step
from megatron.testing.tiny import random_batch
from megatron.train.flops import training_flops_per_token

EXITS = ((), (2,), (2, 4), (2, 4, 6))


@dataclass(frozen=True)
class Shape:
    """A Llama: gated MLP, RMSNorm, rotary positions, untied."""

    layers: int = 8
    hidden: int = 256
    ffn: int = 704
    heads: int = 8
    vocab: int = 8192
    length: int = 256
    batch: int = 4

    def config(self) -> ModelConfig:
        """Our config of it."""
        return ModelConfig(
            num_layers=self.layers, hidden_size=self.hidden, ffn_hidden_size=self.ffn, num_attention_heads=self.heads,
            seq_length=self.length, attention_dropout=0.0, hidden_dropout=0.0, normalization="RMSNorm", swiglu=True,
            position_embedding_type="rope", add_bias_linear=False, untie_embeddings_and_output_weights=True,
        )  # fmt: skip


def our_step(shape: Shape, exits: tuple[int, ...]) -> Callable[[], None]:
    """Ours, with these exits."""
    batch = random_batch(shape.batch, shape.length, shape.vocab)
    return training_step(shape.config(), ExitConfig(exit_layer_nums=exits), shape.vocab, batch)[1]


def transformers_step(shape: Shape) -> Callable[[], None] | None:
    """The same shapes, optimizer, clipping and attention kernel in transformers; None where it isn't installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.ffn, use_cache=False,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, attn_implementation="sdpa",
        max_position_embeddings=shape.length, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    tokens = torch.randint(0, shape.vocab, (shape.batch, shape.length))

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def prediction(shape: Shape, exits: int) -> float:
    """What share more FLOPs than without exits: each exit is one more output matrix."""
    config = shape.config()
    plain, with_exits = (
        training_flops_per_token(config, ExitConfig(exit_layer_nums=numbers), shape.vocab)
        for numbers in ((), tuple(range(1, exits + 1)))
    )
    return with_exits / plain


def main() -> int:
    """Command line; returns the exit code."""
    options = arguments(__doc__)
    shape = Shape(layers=8, hidden=64, ffn=192, vocab=1024, length=64) if options.quick else Shape()
    contestants = {str(len(exits)): our_step(shape, exits) for exits in EXITS}
    if theirs := transformers_step(shape):
        contestants["transformers"] = theirs
    seconds = alternate(contestants, rounds=5 if options.quick else 15)
    tokens = shape.batch * shape.length
    figures = [
        Figure(f"tokens/s with {count} exits", tokens / statistics.median(seconds[str(count)])) for count in range(4)
    ]
    for count in range(1, 4):
        relative = ratio(seconds[str(count)], seconds["0"]) / prediction(shape, count)
        figures.append(Figure(f"step with {count} exits / FLOP prediction", relative, "x", 1.05, at_least=False))
    faster = ratio(seconds["transformers"], seconds["0"]) if theirs else None
    figures.append(Figure("tokens/s without exits / transformers", faster, "x", 1.10))
    sizes = {"num_layers": shape.layers, "hidden_size": shape.hidden, "num_attention_heads": shape.heads,
             "seq_length": shape.length, "vocab": shape.vocab, "batch": shape.batch}  # fmt: skip
    memory = [measure_in_fresh_process(list(exits), sizes) for exits in EXITS]
    for count in range(1, 4):
        # the exits' own norms, with gradients and moments, are the only state that exits add here
        allowed = memory[0]["peak"] + memory[count]["state"] - memory[0]["state"]
        relative = memory[count]["peak"] / allowed
        figures.append(Figure(f"peak memory with {count} exits / without + own state", relative, "x", 1.05, False))
    return finish("train_step", figures, options)


if __name__ == "__main__":
    raise SystemExit(main())
