"""What holds for every tokenizer: fingerprints, foreign ids, padding of the vocabulary."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.errors import ConfigError, DataError
from megatron.tokenizer.base import Tokenizer, padded_vocab_size
from megatron.tokenizer.build import build_tokenizer
from megatron.tokenizer.gpt2 import GPT2BPETokenizer
from megatron.tokenizer.null import NullTokenizer
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer


@pytest.mark.parametrize(
    ("vocab_size", "divisible_by", "tensor_parallel_size", "padded"),
    [
        (505, 64, 1, 512),
        (512, 64, 1, 512),
        (513, 64, 1, 576),
        (32005, 128, 1, 32128),
        (32005, 128, 2, 32256),
        (32005, 128, 4, 32256),
    ],
)
def test_padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int, padded: int) -> None:
    assert padded_vocab_size(vocab_size, divisible_by, tensor_parallel_size) == padded


@given(st.integers(1, 10**6), st.integers(1, 512), st.sampled_from([1, 2, 4, 8]))
def test_padded_vocab_size_is_the_smallest_multiple(size: int, divisible_by: int, tp: int) -> None:
    padded = padded_vocab_size(size, divisible_by, tp)
    assert padded % (divisible_by * tp) == 0
    assert size <= padded < size + divisible_by * tp


def test_fingerprint_follows_contents_and_not_names(gpt2_files: Path, tmp_path: Path) -> None:
    original = GPT2BPETokenizer(gpt2_files / "vocab.json", gpt2_files / "merges.txt")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(gpt2_files / name, tmp_path / f"copy-{name}")
    copy = GPT2BPETokenizer(tmp_path / "copy-vocab.json", tmp_path / "copy-merges.txt")
    assert copy.fingerprint == original.fingerprint
    merges = tmp_path / "copy-merges.txt"
    merges.write_text("\n".join(merges.read_text().split("\n")[:-2]) + "\n")
    assert GPT2BPETokenizer(tmp_path / "copy-vocab.json", merges).fingerprint != original.fingerprint


def test_fingerprint_follows_settings(sentencepiece_model: Path) -> None:
    assert NullTokenizer(10).fingerprint != NullTokenizer(11).fingerprint
    plain, extra = (SentencePieceTokenizer(sentencepiece_model, n) for n in (0, 1))
    assert plain.fingerprint != extra.fingerprint


def test_foreign_ids_are_one_error_everywhere(gpt2_files: Path, sentencepiece_model: Path) -> None:
    built: list[Tokenizer] = [
        NullTokenizer(5),
        GPT2BPETokenizer(gpt2_files / "vocab.json", gpt2_files / "merges.txt"),
        build_tokenizer("HuggingFaceTokenizer", gpt2_files),
        *(
            build_tokenizer(kind, sentencepiece_model)
            for kind in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
        ),
    ]
    for tokenizer in built:
        for foreign in (-1, tokenizer.vocab_size):
            with pytest.raises(DataError, match=f"token id {foreign} is outside"):
                tokenizer.detokenize([foreign])
            with pytest.raises(DataError):
                tokenizer.pieces([foreign])
        last = tokenizer.vocab_size - 1
        assert len(tokenizer.pieces([last])) == 1
        assert tokenizer.detokenize([]) == ""


def test_eod_without_an_end_token_is_an_error() -> None:
    class Endless(NullTokenizer):
        eos = None
        eod = Tokenizer.eod

    with pytest.raises(ConfigError, match="names no end-of-text token"):
        _ = Endless(3).eod
