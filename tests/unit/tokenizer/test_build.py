"""From flags to tokenizers, and the messages where that can't be."""

from pathlib import Path

import pytest

from megatron.config.data import TOKENIZER_TYPES, TokenizerConfig
from megatron.errors import ConfigError
from megatron.tokenizer.build import build_tokenizer


def test_every_type_is_built(gpt2_files: Path, sentencepiece_model: Path) -> None:
    for kind in TOKENIZER_TYPES:
        model = gpt2_files if kind == "HuggingFaceTokenizer" else sentencepiece_model
        config = TokenizerConfig(
            tokenizer_type=kind,
            tokenizer_model=str(model),
            vocab_file=str(gpt2_files / "vocab.json"),
            merge_file=str(gpt2_files / "merges.txt"),
            vocab_size=7,
        )
        tokenizer = build_tokenizer(**vars(config))
        assert type(tokenizer).__name__ == kind
        assert 0 <= tokenizer.eod < tokenizer.vocab_size
        assert len(tokenizer.fingerprint) == 64


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tokenizer_type": None}, "--tokenizer-type is missing; choose one of GPT2BPETokenizer"),
        ({"tokenizer_type": "GPT2Tokenizer"}, "did you mean GPT2BPETokenizer"),
        ({"tokenizer_type": "xyz"}, "unknown; choose one of"),
        ({"tokenizer_type": "BertWordPieceLowerCase"}, "is for BERT"),
        ({"tokenizer_type": "NullTokenizer"}, "NullTokenizer needs --vocab-size"),
        ({"tokenizer_type": "GPT2BPETokenizer"}, "GPT2BPETokenizer needs --vocab-file"),
        ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": __file__}, "needs --merge-file"),
        ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "/no/such"}, "--vocab-file /no/such doesn't exist"),
        ({"tokenizer_type": "Llama2Tokenizer"}, "Llama2Tokenizer needs --tokenizer-model"),
        ({"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "/no"}, "--tokenizer-model /no doesn't"),
        ({"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "/"}, "is a directory"),
        (
            {"tokenizer_type": "NullTokenizer", "vocab_size": 3, "vocab_extra_ids": 1},
            "--vocab-extra-ids works with SentencePieceTokenizer only",
        ),
        ({"tokenizer_type": "SentencePieceTokenizer", "vocab_extra_ids": -1}, "must not be negative"),
    ],
)
def test_flags_that_cannot_be_honoured(flags: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(**flags)
