"""The good files, which tests spoil copies of."""

import gzip
import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import native
from megatron.checkpoint.state import RunState
from megatron.config.load import load, save_config
from megatron.testing.corpus import training_flags, write_corpus
from megatron.tokenizer.training import tokenizer_files, train_byte_level_bpe
from tests.unit.checkpoint.hostile.places import DATA, DIRECTORY, LEGACY, PLACES, WORDS, read_corpus


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which every place finds a good file; each is read here once, so that nothing is imported later."""
    root = tmp_path_factory.mktemp("good")
    tokenizer = train_byte_level_bpe(["the cat sat on the mat"] * 4, 300, merge_whitespace=False)
    (root / DIRECTORY).mkdir(parents=True)
    for name, text in tokenizer_files(tokenizer, "<|endoftext|>").items():
        (root / WORDS / name).write_text(text)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(root / WORDS / name, root / DIRECTORY)
    (root / DIRECTORY / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    import transformers  # noqa: F401 - all three are in tests/requirements.txt: without them nothing here means anything
    from pyarrow import parquet, table
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 20), model_prefix=str(root / WORDS / "words"),
        vocab_size=30, hard_vocab_limit=False, minloglevel=9, num_threads=1,
    )  # fmt: skip
    words = [root / WORDS / name for name in ("vocab.json", "merges.txt")]
    native.save(root / "native", 5, RunState({"model/a": torch.ones(3, 2)}, {"consumed_samples": 12}), words)
    for rank in range(2):
        weight = {"word_embeddings": {"weight": torch.ones(4, 2)}}
        state = {"args": Namespace(seed=1), "model": {"language_model": {"embedding": weight}}, "iteration": 7}
        (root / LEGACY / f"mp_rank_0{rank}").mkdir(parents=True)
        torch.save(state, root / LEGACY / f"mp_rank_0{rank}" / "model_optim_rng.pt")
    (root / "config").mkdir()
    flags = load(training_flags(Path("corpus"), Path("cache"))).config
    for name in ("config.yaml", "config.json"):
        save_config(root / "config" / name, flags)
    (root / DATA).mkdir()
    write_corpus(root / DATA / "corpus")
    (root / DATA / "sums.json").write_text(json.dumps([int(sum(read_corpus(root)[i])) for i in range(3)]))
    (root / "texts").mkdir()
    parquet.write_table(table({"text": ["the cat"]}), root / "texts" / "corpus.parquet")
    (root / "texts" / "corpus.jsonl.gz").write_bytes(gzip.compress(b'{"text": "the cat"}\n'))
    for place in PLACES.values():
        place.read(root)
    return root
