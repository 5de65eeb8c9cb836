"""From flags to a tokenizer: the one place that knows the names of `--tokenizer-type`."""

import difflib
from pathlib import Path

from megatron.config.data import TOKENIZER_TYPES
from megatron.errors import ConfigError
from megatron.tokenizer.base import Tokenizer, padded_vocab_size
from megatron.tokenizer.gpt2 import GPT2BPETokenizer
from megatron.tokenizer.huggingface import load_huggingface
from megatron.tokenizer.null import NullTokenizer
from megatron.tokenizer.sentencepiece import (
    GPTSentencePieceTokenizer,
    Llama2Tokenizer,
    SentencePieceTokenizer,
)

__all__ = ["build_tokenizer", "padded_vocab_size"]


def build_tokenizer(
    tokenizer_type: str | None,
    tokenizer_model: str | Path | None = None,
    vocab_file: str | Path | None = None,
    merge_file: str | Path | None = None,
    vocab_size: int | None = None,
    vocab_extra_ids: int = 0,
) -> Tokenizer:
    """Build the tokenizer that the flags of the same names describe; flags that its type doesn't need
    are not looked at.

    Raises ConfigError naming the flag: unknown type, missing flag, missing or unreadable file, or a
    library to be installed.
    """
    tokenizer_type = _known_type(tokenizer_type, vocab_extra_ids)
    match tokenizer_type:
        case "NullTokenizer":
            if vocab_size is None:
                raise ConfigError("NullTokenizer needs --vocab-size")
            return NullTokenizer(vocab_size)
        case "GPT2BPETokenizer":
            return GPT2BPETokenizer(
                _file("--vocab-file", vocab_file, tokenizer_type),
                _file("--merge-file", merge_file, tokenizer_type),
            )
        case "HuggingFaceTokenizer":
            return load_huggingface(_path("--tokenizer-model", tokenizer_model, tokenizer_type))
    model = _file("--tokenizer-model", tokenizer_model, tokenizer_type)
    if tokenizer_type == "SentencePieceTokenizer":
        return SentencePieceTokenizer(model, vocab_extra_ids)
    return Llama2Tokenizer(model) if tokenizer_type == "Llama2Tokenizer" else GPTSentencePieceTokenizer(model)


def _known_type(tokenizer_type: str | None, vocab_extra_ids: int) -> str:
    if not tokenizer_type:
        raise ConfigError(f"--tokenizer-type is missing; choose one of {', '.join(TOKENIZER_TYPES)}")
    if tokenizer_type.startswith("BertWordPiece"):
        raise ConfigError(
            f"--tokenizer-type {tokenizer_type} is for BERT, which this framework doesn't train; "
            f"choose one of {', '.join(TOKENIZER_TYPES)}"
        )
    if tokenizer_type not in TOKENIZER_TYPES:
        near = difflib.get_close_matches(tokenizer_type, TOKENIZER_TYPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(TOKENIZER_TYPES)}"
        raise ConfigError(f"--tokenizer-type {tokenizer_type} is unknown; {hint}")
    if vocab_extra_ids < 0:
        raise ConfigError(f"--vocab-extra-ids must not be negative, got {vocab_extra_ids}")
    if vocab_extra_ids and tokenizer_type != "SentencePieceTokenizer":
        raise ConfigError(f"--vocab-extra-ids works with SentencePieceTokenizer only, not {tokenizer_type}")
    return tokenizer_type


def _path(flag: str, value: str | Path | None, tokenizer_type: str) -> Path:
    if not value:
        raise ConfigError(f"{tokenizer_type} needs {flag}")
    path = Path(value)
    if not path.exists():
        raise ConfigError(f"{flag} {path} doesn't exist")
    return path


def _file(flag: str, value: str | Path | None, tokenizer_type: str) -> Path:
    path = _path(flag, value, tokenizer_type)
    if not path.is_file():
        raise ConfigError(f"{flag} {path} is a directory; {tokenizer_type} needs a file")
    return path
