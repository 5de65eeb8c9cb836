"""Toy corpora of random tokens in Megatron's .bin/.idx form, for tests that train through the command line."""

from pathlib import Path

import numpy as np

from megatron.data.indexed import IndexedWriter

VOCAB = 60


def write_corpus(prefix: Path, documents: int = 60, seed: int = 0, vocab_size: int = VOCAB) -> Path:
    """Write documents of 5 to 60 skewed random tokens, each ended by id `vocab_size` (NullTokenizer's eod)."""
    random = np.random.RandomState(seed)
    with IndexedWriter(str(prefix), np.dtype(np.uint16)) as writer:
        for _ in range(documents):
            length = random.randint(5, 60)
            tokens = np.minimum(random.geometric(0.1, length), vocab_size) - 1
            writer.add_document(np.append(tokens, vocab_size).astype(np.uint16))
    return prefix


def training_flags(prefix: Path, cache: Path, **changes: object) -> list[str]:
    """Flags of a toy run: 4 layers, exits after layers 1 and 3, dropout on, 20 iterations of 8 sequences.

    Keyword arguments are flags with underscores; None drops a flag, True gives it without a value.
    """
    flags: dict[str, object] = {
        "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 24, "init_method_std": 0.1,
        "attention_dropout": 0.1, "hidden_dropout": 0.1, "make_vocab_size_divisible_by": 16,
        "exit_layer_nums": "1 3", "exit_layer_weight": "0.25 0.5",
        "tokenizer_type": "NullTokenizer", "vocab_size": VOCAB,
        "data_path": prefix, "data_cache_path": cache, "split": "80,10,10", "num_workers": 0,
        "micro_batch_size": 2, "global_batch_size": 8, "train_iters": 20, "eval_iters": 1, "eval_interval": 1000,
        "lr": 2e-3, "min_lr": 1e-4, "lr_decay_style": "cosine", "lr_warmup_iters": 3, "log_interval": 10,
    }  # fmt: skip
    argv: list[str] = []
    for name, value in (flags | changes).items():
        if value is None:
            continue
        argv.append("--" + name.replace("_", "-"))
        if value is not True:
            argv += str(value).split()
    return argv
