"""From a checkpoint to a model that generates: `--load DIR` alone is enough for a native one."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from megatron.checkpoint import megatron_legacy, native
from megatron.checkpoint.find import NATIVE, Found, recognise
from megatron.checkpoint.part import check_whole
from megatron.checkpoint.state import MODEL, OPTIMIZER, copy_into
from megatron.checkpoint.stored_run import stored_config
from megatron.checkpoint.typed import text
from megatron.config.data import TokenizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.run import RunConfig
from megatron.errors import CheckpointError, ConfigError
from megatron.model.build import build_model
from megatron.model.gpt import GPT
from megatron.model.names import model_state
from megatron.parallel.backend import Backend
from megatron.parallel.mesh import Mesh
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer

DType = Literal["float32", "float16", "bfloat16"]


def load_model(
    directory: str | Path,
    iteration: int | None = None,
    *,
    device: Literal["cpu", "cuda"] | None = None,
    dtype: DType | None = None,
    tokenizer: TokenizerConfig | None = None,
) -> tuple[GPT, Tokenizer, RunConfig]:
    """Load weights, tokenizer and config of a checkpoint, native or Megatron's, told apart by content.

    iteration None is the newest. device None is the GPU where there is one; dtype None is the one trained in.
    tokenizer None takes the files inside a native checkpoint. Returns the model in evaluation mode.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it does not fit its own config.
        ConfigError: the tokenizer is missing or another one; cuda was asked for and there is none.
    """
    backend = Backend.choose("gloo" if device == "cpu" else None)
    if device == "cuda" and not backend.is_cuda:
        raise ConfigError("--device cuda: no GPU is visible; leave the flag out, or give cpu")
    found = recognise(Path(directory), iteration)
    config = _config(found, dtype, tokenizer)
    words = build_tokenizer(**asdict(config.tokenizer))
    model = build_model(config, Mesh.build(ParallelConfig(), backend), words.vocab_size)
    _load_weights(found, model, words)
    return model.eval().requires_grad_(False), words, config


def _config(found: Found, dtype: DType | None, tokenizer: TokenizerConfig | None) -> RunConfig:
    if tokenizer is None and found.format != NATIVE:
        raise ConfigError(
            f"{found.directory} is a Megatron checkpoint, which carries no tokenizer: give --tokenizer-type and "
            "--tokenizer-model (or --vocab-file and --merge-file)"
        )
    if found.format == NATIVE:
        check_whole(native.read_facts(found.directory), found.directory)
    config = stored_config(found)
    if dtype is not None:
        precision = replace(config.precision, fp16=dtype == "float16", bf16=dtype == "bfloat16")
        config = replace(config, precision=precision)
    # However it was trained, it runs in one process here.
    config = replace(config, parallel=ParallelConfig())
    return config if tokenizer is None else replace(config, tokenizer=tokenizer)


def _load_weights(found: Found, model: GPT, tokenizer: Tokenizer) -> None:
    targets = {MODEL + name: part.view for name, part in model_state(model, tokenizer.vocab_size).items()}
    if found.format != NATIVE:
        state = megatron_legacy.read(found.directory, tokenizer.vocab_size, with_optimizer=False)
        copy_into(state.tensors, targets, str(found.directory), convert=True)
        return
    if text(native.read_facts(found.directory), "tokenizer", str(found.directory)) != tokenizer.fingerprint:
        raise CheckpointError(
            f"{found.directory} was trained with another tokenizer: leave out the tokenizer's flags to use its own"
        )
    native.load(found.directory, targets, ignore=(OPTIMIZER,), convert=True)
