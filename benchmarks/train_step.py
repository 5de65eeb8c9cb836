"""A training step with 0 to 3 exits: its time against what the FLOPs predict, and against Hugging Face transformers.

On the CPU in fp32; each contestant takes a step in turn, figures are medians of ratios within a round. On a GPU, too: a
1.3B model in bf16 with and without two exits, against the rate that a large matrix product reaches there.
"""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from report import Figure, alternate, arguments, finish, ratios

from megatron.config.data import TokenizerConfig
from megatron.config.model import ExitConfig, ModelConfig
from megatron.config.run import RunConfig
from megatron.config.training import LrConfig, OptimizerConfig, PrecisionConfig, TrainingConfig
from megatron.parallel.backend import Backend
from megatron.planning.flops import training_flops_per_token
from megatron.testing.step_memory import measure_in_fresh_process
from megatron.testing.tiny import random_batch
from megatron.train import checkpoints
from megatron.train.build import build_trainer
from megatron.train.step import train_step

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


def our_step(shape: Shape, exits: tuple[int, ...], backend: Backend, bf16: bool = False) -> Callable[[], None]:
    """Ours with these exits: the step of the training loop, on one microbatch."""
    training = TrainingConfig(micro_batch_size=shape.batch, global_batch_size=shape.batch, train_iters=1000)
    config = RunConfig(
        model=shape.config(),
        exits=ExitConfig(exit_layer_nums=exits),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=shape.vocab - 1),
        training=training,
        optimizer=OptimizerConfig(weight_decay=0.0),
        learning_rate=LrConfig(lr=1e-3),
        precision=PrecisionConfig(bf16=bf16),
    )
    trainer = build_trainer(config, backend)
    checkpoints.start(trainer)
    batch = random_batch(shape.batch, shape.length, shape.vocab - 1)
    batch = type(batch)(*(None if part is None else part.to(backend.device) for part in vars(batch).values()))

    def step() -> None:
        train_step(trainer, [batch])
        backend.synchronize()

    return step


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


def cpu_figures(shape: Shape, rounds: int) -> list[Figure]:
    """Time of a step, alone, against its FLOPs and against transformers."""
    backend = Backend.choose("gloo")
    contestants = {str(len(exits)): our_step(shape, exits, backend) for exits in EXITS}
    if theirs := transformers_step(shape):
        contestants["transformers"] = theirs
    seconds = alternate(contestants, rounds)
    tokens = shape.batch * shape.length
    figures = [
        Figure.of(f"tokens/s with {count} exits", [tokens / s for s in seconds[str(count)]]) for count in range(4)
    ]
    for count in range(1, 4):
        predicted = prediction(shape, count)
        relative = [found / predicted for found in ratios(seconds[str(count)], seconds["0"])]
        figures.append(Figure.of(f"step with {count} exits / FLOP prediction", relative, "x", 1.05, at_least=False))
    name = "tokens/s without exits / transformers"
    if not theirs:
        return [*figures, Figure(name, None, "x", 1.10)]
    return [*figures, Figure.of(name, ratios(seconds["transformers"], seconds["0"]), "x", 1.10)]


def memory_figures(shape: Shape) -> list[Figure]:
    """Peak memory of a fresh process that takes steps with exits, against one without."""
    sizes = {"num_layers": shape.layers, "hidden_size": shape.hidden, "num_attention_heads": shape.heads,
             "seq_length": shape.length, "vocab": shape.vocab, "batch": shape.batch}  # fmt: skip
    memory = [measure_in_fresh_process(list(exits), sizes) for exits in EXITS]
    figures = []
    for count in range(1, 4):
        # the exits' own norms, with gradients and moments, are the only state that exits add here
        allowed = memory[0]["peak"] + memory[count]["state"] - memory[0]["state"]
        relative = memory[count]["peak"] / allowed
        figures.append(Figure(f"peak memory with {count} exits / without + own state", relative, "x", 1.05, False))
    return figures


def gpu_figures(shape: Shape, exits: tuple[int, ...], rounds: int) -> list[Figure]:
    """A large model on the GPU in bf16; nothing but names and goals where there is none."""
    names = ("GPU: model FLOP/s with 2 exits / matmul ceiling", "GPU: step with 2 exits / FLOP prediction")
    if not torch.cuda.is_available():
        return [Figure(names[0], None, "x", 0.5), Figure(names[1], None, "x", 1.02, at_least=False)]
    seconds, ceiling, peaks = large_model(shape, exits, rounds, Backend.choose("nccl"))
    flops = training_flops_per_token(shape.config(), ExitConfig(exit_layer_nums=exits), shape.vocab)
    work, predicted = flops * shape.batch * shape.length, prediction(shape, len(exits))
    relative = [found / predicted for found in ratios(seconds["with exits"], seconds["without"])]
    return [
        Figure("GPU: matmul ceiling", ceiling / 1e12, "TFLOP/s"),
        Figure.of(names[0], [work / spent / ceiling for spent in seconds["with exits"]], "x", 0.5),
        Figure.of(names[1], relative, "x", 1.02, at_least=False),
        *(Figure(f"GPU: peak memory {name}", peak / 1e9, "GB") for name, peak in peaks.items()),
    ]


def large_model(
    shape: Shape, exits: tuple[int, ...], rounds: int, backend: Backend, side: int = 8192
) -> tuple[dict[str, list[float]], float, dict[str, int]]:
    """Seconds of steps with and without exits, in turns; FLOP/s of a square matrix product of that side in bf16; and
    the most bytes that each took while it was alone."""
    variants = {"without": (), "with exits": exits}
    peaks = {}
    for name, numbers in variants.items():
        gc.collect()  # the one before holds on to itself
        peaks[name] = peak_memory(our_step(shape, numbers, backend, bf16=True))
    steps = {name: our_step(shape, numbers, backend, bf16=True) for name, numbers in variants.items()}
    seconds = alternate(steps, rounds)
    matrix = torch.randn(side, side, device=backend.device, dtype=torch.bfloat16)

    def multiply() -> None:
        for _ in range(10):
            torch.mm(matrix, matrix)
        backend.synchronize()

    return seconds, 10 * 2 * side**3 / statistics.median(alternate({"": multiply}, rounds)[""]), peaks


def peak_memory(step: Callable[[], None]) -> int:
    """Most bytes on the GPU during two steps."""
    torch.cuda.reset_peak_memory_stats()
    step(), step()
    return torch.cuda.max_memory_allocated()


def main() -> int:
    """Command line; returns the exit code."""
    options = arguments(__doc__)
    shape = Shape(layers=8, hidden=64, ffn=192, vocab=1024, length=64) if options.quick else Shape()
    figures = cpu_figures(shape, 5 if options.quick else 31) + memory_figures(shape)
    large = Shape(layers=24, hidden=2048, ffn=5504, heads=16, vocab=50304, length=2048, batch=4)
    return finish("train_step", figures + gpu_figures(large, (6, 12), 5 if options.quick else 15), options)


if __name__ == "__main__":
    raise SystemExit(main())
