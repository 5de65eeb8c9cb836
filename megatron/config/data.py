"""Where tokens come from. Frozen values, no torch."""

from dataclasses import dataclass
from typing import Literal

from megatron.config.setting import setting

TOKENIZER_TYPES = (
    "GPT2BPETokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "NullTokenizer",
)


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer made the data."""

    tokenizer_type: str | None = setting(None, "Kind of tokenizer.", choices=TOKENIZER_TYPES)
    tokenizer_model: str | None = setting(
        None, "SentencePiece model, tokenizer.json, or a Hugging Face tokenizer directory.", metavar="PATH"
    )
    vocab_file: str | None = setting(None, "vocab.json of a GPT-2 BPE.", metavar="FILE")
    merge_file: str | None = setting(None, "merges.txt of a GPT-2 BPE.", metavar="FILE")
    vocab_size: int | None = setting(None, "Vocabulary of NullTokenizer.")
    vocab_extra_ids: int = setting(0, "Extra <extra_id_i> tokens (SentencePieceTokenizer).")


@dataclass(frozen=True)
class DataConfig:
    """Datasets, their mixture, and how batches are cut from them."""

    data_path: tuple[str, ...] = setting(
        (),
        "Prefix of one .bin/.idx pair, or a blend: weight1 prefix1 weight2 prefix2 ...",
        metavar="[WEIGHT] PREFIX ...",
    )
    split: str = setting("969, 30, 1", "Shares of train, validation and test within --data-path.", metavar="A,B,C")
    train_data_path: tuple[str, ...] = setting(
        (), "Training data of its own (instead of --data-path).", metavar="[WEIGHT] PREFIX ..."
    )
    valid_data_path: tuple[str, ...] = setting((), "Validation data of its own.", metavar="[WEIGHT] PREFIX ...")
    test_data_path: tuple[str, ...] = setting((), "Test data of its own.", metavar="[WEIGHT] PREFIX ...")
    data_cache_path: str | None = setting(None, "Where index caches are kept.", metavar="DIR")
    dataloader_type: Literal["single", "cyclic"] = setting(
        "single", "One pass in index order, or passes of fresh permutations."
    )
    data_sharding: bool = setting(True, "Shard the cyclic permutation among dp ranks.", off="--no-data-sharding")
    num_workers: int = setting(2, "Data loading processes; 0 reads in the training process.")
    reset_position_ids: bool = setting(False, "Positions start again after each end of document.")
    reset_attention_mask: bool = setting(False, "Tokens attend only within their document.")
    eod_mask_loss: bool = setting(False, "No loss on end-of-document tokens.")
