"""Converting checkpoints between Megatron's format and the native one: MB/s and memory of a fresh process each.

The model has a gigabyte of weights. A conversion reads, writes and reads back what it wrote; memory is the peak of its
process less that of one that merely imports the same. Files go to the temporary directory (TMPDIR).
"""

import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from report import Figure, arguments, finish

from megatron.checkpoint.convert import megatron_target
from megatron.checkpoint.convert.base import Layout, TensorSpec
from megatron.checkpoint.convert.convert import Conversion, convert
from megatron.cli.conversion import return_large_blocks
from megatron.config.data import TokenizerConfig
from megatron.config.model import ModelConfig
from megatron.config.run import RunConfig
from megatron.model.build import build_model
from megatron.model.init import initial_value
from megatron.model.names import model_state
from megatron.parallel.backend import Backend, peak_resident_bytes
from megatron.parallel.mesh import Mesh

WORDS = {"tokenizer_type": "NullTokenizer", "vocab_size": 31_999}
LIMIT = 1.5  # GiB


class Drawn:
    """A Llama of random weights as a source that keeps none of them."""

    def __init__(self, quick: bool) -> None:
        hidden, layers = (256, 4) if quick else (1024, 16)
        model = ModelConfig(
            num_layers=layers, hidden_size=hidden, num_attention_heads=8, seq_length=1024, normalization="RMSNorm",
            position_embedding_type="rope", swiglu=True, add_bias_linear=False,
            untie_embeddings_and_output_weights=True,
        )  # fmt: skip
        self.config = replace(RunConfig(), model=model, tokenizer=TokenizerConfig(**WORDS))
        self.iteration, self.facts = 1, {}
        vocabulary = WORDS["vocab_size"] + 1
        built = build_model(self.config, Mesh.build(self.config.parallel, Backend.choose("gloo")), vocabulary)
        self._specs = {
            name: TensorSpec(tuple(part.shape), part.view.dtype)
            for name, part in model_state(built, vocabulary).items()
        }

    def specs(self) -> dict[str, TensorSpec]:
        return self._specs

    def read(self, name: str) -> torch.Tensor:
        return initial_value(name, self._specs[name].shape, self.config.model, seed=1)

    def tokenizer_files(self) -> list[Path]:
        return []

    def close(self) -> None:
        pass


def measure(source: str, target: str, tp: int, load: str, save: str) -> None:
    """Print seconds, bytes of the model and how far converting raises this process's peak."""
    return_large_blocks()  # as the command does
    before = peak_resident_bytes()
    begin = time.perf_counter()
    tokenizer = WORDS if source == "megatron" else {}
    job = Conversion(Path(load), Path(save), source, target, layout=Layout(tp, 1), tokenizer=tokenizer)
    report = convert(job, lambda total: lambda size: None)
    seconds = time.perf_counter() - begin
    figures = {"seconds": seconds, "bytes": report.nbytes, "raised": peak_resident_bytes() - before}
    sys.stdout.write(json.dumps(figures))


def measured(*words: object) -> dict[str, float]:
    """`measure` in a fresh process."""
    code = f"import convert; convert.measure{words!r}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def figures_of(options: Namespace, root: Path) -> list[Figure]:
    """All of it."""
    megatron_target.write(Drawn(options.quick), root / "megatron", Layout(1, 1), lambda path: None)
    figures = []
    steps = (("megatron", "native", 1), ("native", "megatron", 2), ("native", "megatron", 1))
    for number, (source, target, tp) in enumerate(steps):
        load, save = root / source, root / (target if number == 0 else f"{target} {number}")
        found = measured(source, target, tp, str(load), str(save))
        if not figures:
            figures.append(Figure("model", found["bytes"] / 1e6, "MB"))
        name = f"{source} to {target}" + (f", tp={tp}" if target == "megatron" else "")
        figures.append(Figure(name, found["bytes"] / 1e6 / found["seconds"], "MB/s"))
        figures.append(Figure(f"memory, {name}", found["raised"] / 2**30, "GiB", LIMIT, at_least=False))
    return figures


def main() -> int:
    """Command line; returns the exit code."""
    options = arguments(__doc__)
    with tempfile.TemporaryDirectory() as root:
        return finish("convert", figures_of(options, Path(root)), options)


if __name__ == "__main__":
    raise SystemExit(main())
