"""A Hugging Face directory as a source: config.json, tensors and tokenizer, with the exits that an export left beside.

Nothing in the directory runs. Rows of the vocabulary that no id of the tokenizer uses are padding, as ours are.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from megatron.checkpoint.convert.base import TensorSpec
from megatron.checkpoint.convert.hf_config import CONFIG, Fields, model_of, model_type, read_json
from megatron.checkpoint.convert.hf_files import TensorFiles, open_model
from megatron.checkpoint.convert.hf_names import COMPUTED, Names
from megatron.checkpoint.state import PADDING
from megatron.config.data import TokenizerConfig
from megatron.config.model import ExitConfig, ModelConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.rules import check
from megatron.config.run import RunConfig
from megatron.config.stored import from_dict
from megatron.config.training import PrecisionConfig
from megatron.errors import CheckpointError, ConfigError
from megatron.model.gpt import GPT
from megatron.model.names import model_state
from megatron.model.partition import stages_of
from megatron.tokenizer.build import build_tokenizer

EXIT_CONFIG = "exits.json"
EXIT_FORMAT = {"format": "ee-llm-exits", "version": 1}
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_CARRIED = (
    *_TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


class HfSource:
    """The model in a Hugging Face directory: Llama, Mistral, Qwen2, Qwen3 or GPT-2."""

    iteration = 0

    def __init__(self, directory: Path) -> None:
        """Reads config and headers; tensors are read on demand.

        Raises:
            CheckpointError: a file is missing or damaged, the architecture or a feature is not supported, or the
                tensors are not those that config.json describes.
            ConfigError: the tokenizer cannot be read, or a size breaks a rule of our models.
        """
        self.directory = directory
        config = Fields(read_json(directory / CONFIG), str(directory / CONFIG))
        kind, model = model_type(config), model_of(config)
        self._rows = config.whole("vocab_size", 50257 if kind == "gpt2" else None)
        tokenizer, self._ids = _tokenizer(directory, self._rows)
        exits = _exits(directory)
        self._names = Names.of(kind, model)
        self._files = open_model(directory)
        word = self._their_name(self._names.top["embedding.word"] + ".weight")
        precision = _precision(self._files, word, (self._rows, model.hidden_size), config)
        self.config = RunConfig(model=model, exits=exits, tokenizer=tokenizer, precision=precision)
        self.facts: dict[str, Any] = {
            "huggingface": {"model_type": kind, "vocab_size": self._rows} | kept_values(config.values)
        }
        check(self.config, run=False, where=str(directory / CONFIG))
        self._specs = self._matched(self._shapes(model, exits, config))

    def specs(self) -> Mapping[str, TensorSpec]:
        """Native name -> shape and dtype; rows beyond the tokenizer's ids are `<name>.padding`."""
        return self._specs

    def read(self, name: str) -> Tensor:
        """One whole tensor on the CPU. Raises CheckpointError where its file cannot be read."""
        whole = name.removesuffix(PADDING)
        parts = [self._files.read(self._their_name(theirs)) for theirs in self._names.theirs(whole)]
        tensor = self._names.join(whole, parts)
        if name != whole:
            return tensor[self._ids :].clone()
        rows = self._specs[name].shape[0]
        return (tensor if len(tensor) == rows else tensor[:rows].clone()).contiguous()

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files, chat template and generation settings, as far as they are there."""
        # Without a tokenizer.json, transformers needs config.json to know the kind of tokenizer.
        needs_config = self.config.tokenizer.tokenizer_model and not (self.directory / "tokenizer.json").exists()
        names = (*_CARRIED, CONFIG) if needs_config else _CARRIED
        return [self.directory / name for name in names if (self.directory / name).is_file()]

    def close(self) -> None:
        """Let go of the files."""
        self._files.close()

    def _shapes(self, model: ModelConfig, exits: ExitConfig, config: Fields) -> dict[str, tuple[int, ...]]:
        """Native name -> shape of all that such a model has, told by the model itself."""
        if model.num_layers > len(self._files.specs):
            config.refuse(f"it says {model.num_layers} layers, but there are {len(self._files.specs)} tensors in all")
        try:
            with torch.device("meta"):
                gpt = GPT(model, exits, stages_of(model, exits, ParallelConfig()), self._rows)
        except (RuntimeError, OverflowError) as error:
            config.refuse(f"no model is that large: {str(error).splitlines()[0][:200]}")
        return {name: placed.shape for name, placed in model_state(gpt, self._ids).items()}

    def _matched(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
        """Our tensors' specs, once every tensor of the files is known to be the model's, and of its shape."""
        stored, specs, used, problems = self._files.specs, {}, set(), []
        for name, shape in shapes.items():
            parts = self._parts(name, shapes)
            found = {theirs: stored[theirs] for theirs in parts if theirs in stored}
            problems += [f"{theirs} is missing" for theirs in parts if theirs not in stored]
            problems += [
                f"{theirs} is {list(spec.shape)} instead of {list(parts[theirs])}"
                for theirs, spec in found.items()
                if spec.shape != parts[theirs]
            ]
            dtypes = {spec.dtype for spec in found.values()}
            if len(dtypes) > 1:
                problems.append(f"{', '.join(found)} are of different types")
            specs[name] = TensorSpec(shape, next(iter(dtypes), torch.float32))
            used |= parts.keys()
        extra = [name for name in stored if name not in used and not COMPUTED.fullmatch(name)]
        problems += [f"{name:.200} is not part of the model" for name in extra if not self._is_tied_copy(name)]
        if problems:
            self._refuse(list(dict.fromkeys(problems)))
        return specs

    def _refuse(self, problems: list[str]) -> NoReturn:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        tied = not self.config.model.untie_embeddings_and_output_weights
        hint = f" (tie_word_embeddings is {str(tied).lower()})" if "lm_head" in "".join(problems) else ""
        raise CheckpointError(f"{self.directory} is not as its {CONFIG} says: {'; '.join(problems[:8])}{more}{hint}")

    def _parts(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The stored tensors that make up one of ours, padding rows included, by their name in the files."""
        whole = name.removesuffix(PADDING)
        shape = shapes[whole]
        rows = self._rows if f"{whole}{PADDING}" in shapes else shape[0]
        parts = self._names.split(whole, torch.empty(rows, *shape[1:], device="meta"))
        names = map(self._their_name, self._names.theirs(whole))
        return {theirs: tuple(part.shape) for theirs, part in zip(names, parts, strict=True)}

    def _is_tied_copy(self, name: str) -> bool:
        """Whether a tensor repeats the word embedding, as some files of tied models do."""
        word = self._their_name(self._names.top["embedding.word"] + ".weight")
        if name != "lm_head.weight" or self.config.model.untie_embeddings_and_output_weights:
            return False
        same_kind = self._files.specs[name] == self._files.specs[word]
        return same_kind and torch.equal(self._files.read(name), self._files.read(word))

    def _their_name(self, name: str) -> str:
        """A tensor's name in the files: those of a bare base model leave out its prefix."""
        bare = name.removeprefix(self._names.base)
        return bare if name not in self._files.specs and bare in self._files.specs else name


def kept_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json, or the facts of a conversion, says of tokens and caching: kept for the way back."""
    found = {name: values[name] for name in _KEPT if name in values}
    return {
        name: value
        for name, value in found.items()
        if value is None or all(type(each) in (int, bool) for each in (value if isinstance(value, list) else [value]))
    }


def _exits(directory: Path) -> ExitConfig:
    """The exits that an export of ours left beside the model; none where there is no such file."""
    path = directory / EXIT_CONFIG
    if not path.exists():
        return ExitConfig()
    values = read_json(path)
    if any(values.pop(key, None) != value for key, value in EXIT_FORMAT.items()):
        raise CheckpointError(f"{path} is no description of exits that is known ({EXIT_FORMAT})")
    try:
        return from_dict({"exits": values}, str(path)).exits
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _tokenizer(directory: Path, rows: int) -> tuple[TokenizerConfig, int]:
    """The directory's tokenizer and the number of its ids; without one, every row of the vocabulary is an id."""
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=max(rows - 1, 1)), rows
    config = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(directory))
    ids = build_tokenizer(**asdict(config)).vocab_size
    if ids > rows:
        raise CheckpointError(
            f"{directory}: its tokenizer has {ids} ids, the model rows for {rows}: give the tokenizer that the model "
            "was made with, or resize the model's embeddings"
        )
    return config, ids


def _precision(files: TensorFiles, word: str, shape: tuple[int, int], config: Fields) -> PrecisionConfig:
    """That of the word embedding, whose shape is checked first: it bounds what the config can ask for."""
    spec = files.specs.get(word)
    if spec is None or spec.shape != shape:
        found = "is missing" if spec is None else f"is {list(spec.shape)}"
        config.refuse(f"it says vocab_size {shape[0]} and hidden size {shape[1]}, but {word} {found}")
    return PrecisionConfig(fp16=spec.dtype == torch.float16, bf16=spec.dtype == torch.bfloat16)
