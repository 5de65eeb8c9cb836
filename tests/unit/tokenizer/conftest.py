"""Tiny tokenizers, trained here: a GPT-2 style pair of files and a SentencePiece model."""

import io
from pathlib import Path

import pytest

from megatron.tokenizer.gpt2 import END_OF_TEXT
from megatron.tokenizer.training import tokenizer_files, train_byte_level_bpe

PROSE = [
    "The quick brown fox jumps over the lazy dog, and the lazy dog sleeps on.",
    "def area(width, height):\n    # two sides\n    return width * height\n",
    "Numbers such as 1, 22 and 4096; it's 2:30 now. Größe, naïve, 東京.",
]


@pytest.fixture(scope="session")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with vocab.json, merges.txt, tokenizer.json and tokenizer_config.json of one tokenizer."""
    directory = tmp_path_factory.mktemp("gpt2")
    tokenizer = train_byte_level_bpe(PROSE * 3, 320, merge_whitespace=False)
    for name, content in tokenizer_files(tokenizer, END_OF_TEXT).items():
        (directory / name).write_text(content, encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 pieces with byte fallback: <unk> 0, <s> 1, </s> 2, no padding piece."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    model = io.BytesIO()
    trainer.train(
        sentence_iterator=iter(" ".join(PROSE * 3).split("\n")),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
    )
    path = tmp_path_factory.mktemp("spm") / "toy.model"
    path.write_bytes(model.getvalue())
    return path
