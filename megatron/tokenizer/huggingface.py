"""Tokenizers in Hugging Face's formats, from local files only and running no code that comes with them.

A tokenizer.json needs the `tokenizers` library alone; other directories go through transformers (optional).
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from megatron.errors import ConfigError
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.fast import FastTokenizer

# where neither settings file names the end of text: what well-known vocabularies call it
USUAL_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
DIRECTORY_FILES = (
    "tokenizer.json", *SETTINGS_FILES, "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "config.json",
)  # fmt: skip


class HuggingFaceTokenizer(FastTokenizer):
    """A tokenizer.json. Its own template is applied: where it says that a text begins with BOS, it does."""

    def __init__(self, path: Path) -> None:
        with _errors_of(path, "is no tokenizer.json"):
            library = tokenizers.Tokenizer.from_file(str(path))
            library.no_truncation()
            library.no_padding()
            library.encode("A few words: it may stumble over them only now.")
        settings = [path.with_name(name) for name in SETTINGS_FILES if path.with_name(name).is_file()]
        super().__init__(
            library,
            [path, *settings],
            eos=_named_token(library, settings, "eos_token", USUAL_EOS),
            bos=_named_token(library, settings, "bos_token"),
        )


class AutoTokenizerAdapter(Tokenizer):
    """A directory that only transformers can read (no tokenizer.json in it)."""

    def __init__(self, directory: Path) -> None:
        files = [directory / name for name in DIRECTORY_FILES if (directory / name).is_file()]
        if not files:
            raise ConfigError(f"--tokenizer-model {directory} holds no tokenizer: expected tokenizer.json")
        try:
            from transformers import AutoTokenizer
        except ImportError as err:
            raise ConfigError(
                f"--tokenizer-model {directory} holds no tokenizer.json; reading the directory needs the "
                "transformers library: pip install 'ee-llm[hf]'"
            ) from err
        with _errors_of(directory, "cannot be read"):
            self._library: Any = AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
            self._vocab_size = max(self._library.get_vocab().values(), default=-1) + 1
        super().__init__(files)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def bos(self) -> int | None:
        return self._library.bos_token_id

    @property
    def eos(self) -> int | None:
        return self._library.eos_token_id

    def tokenize(self, text: str) -> list[int]:
        return self._library.encode(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        self._check_ids(ids)
        return self._library.decode(list(ids), clean_up_tokenization_spaces=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.detokenize([i]) for i in ids]


def load_huggingface(path: Path) -> Tokenizer:
    """`path`: a tokenizer.json or a directory. ConfigError where it can't be read."""
    if path.is_file():
        return HuggingFaceTokenizer(path)
    if (path / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(path / "tokenizer.json")
    return AutoTokenizerAdapter(path)


@contextmanager
def _errors_of(path: Path, what: str) -> Iterator[None]:
    """Whatever the libraries raise as a ConfigError: they name no class for it, and what fails in Rust is not even an
    Exception."""
    try:
        yield
    except BaseException as err:
        if not isinstance(err, Exception) and type(err).__name__ != "PanicException":
            raise
        reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
        raise ConfigError(f"--tokenizer-model {path} {what}: {reason}") from err


def _named_token(
    library: tokenizers.Tokenizer, settings: Sequence[Path], role: str, usual: Sequence[str] = ()
) -> int | None:
    """Id of the token that the settings files name for `role`, else of the first usual name it knows."""
    for path in settings:
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as err:
            raise ConfigError(f"{path} cannot be read: {err}") from err
        token = values.get(role) if isinstance(values, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            continue
        known = isinstance(token, str) and not any("\ud800" <= character <= "\udfff" for character in token)
        token_id = library.token_to_id(token) if known else None
        if token_id is None:
            raise ConfigError(f"{path} names {role} {token!r}, which the tokenizer beside it doesn't know")
        return token_id
    return next((i for i in map(library.token_to_id, usual) if i is not None), None)
