"""Trains a byte-level BPE: every UTF-8 text can be written in it and comes back byte for byte.

The same texts give the same tokenizer. `tokenizer_files` gives what `HuggingFaceTokenizer` and, where the format
can say it, `GPT2BPETokenizer` read.
"""

import json
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron.errors import ConfigError
from megatron.tokenizer.gpt2 import END_OF_TEXT

ALPHABET_SIZE = 256  # one symbol a byte

# Where a text may be cut before merging, first match wins. Unlike GPT-2's cut, a run of white space with a line
# break in it (a blank line, a line's end with the next one's indentation) is a piece of its own and can become a
# single token, and long numbers are cut into threes.
WHITESPACE_RUNS = "|".join(
    [
        r"\s*\n\s*",  # line break with all white space around it
        r"'(?:[sdmt]|ll|ve|re)\b",  # English endings: it's, we'll
        r" ?\p{L}+",  # word with the blank before it
        r" ?\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+",  # punctuation
        r"\s+(?!\S)",  # white space but for the blank that goes with the next word
        r"\s+",
    ]
)


def train_byte_level_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    merge_whitespace: bool = True,
    special_tokens: Sequence[str] = (END_OF_TEXT,),
    min_frequency: int = 2,
    show_progress: bool = False,
) -> tokenizers.Tokenizer:
    """Learn merges until the vocabulary has `vocab_size` entries or no pair occurs `min_frequency` times.

    Special tokens take the first ids; the first of them separates documents. With `merge_whitespace` runs of
    white space around line breaks may become single tokens, else texts are cut as GPT-2 does.
    ConfigError for a vocabulary too small for all bytes and the special tokens, or bad special tokens.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer(merge_whitespace)
    tokenizer.decoder = decoders.ByteLevel()
    _check_vocabulary(vocab_size, special_tokens, min_frequency)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_files(tokenizer: tokenizers.Tokenizer, eos_token: str) -> dict[str, str]:
    """File name to content for what `train_byte_level_bpe` made.

    tokenizer.json and tokenizer_config.json always; vocab.json and merges.txt where `GPT2BPETokenizer` would
    make the same ids of a text from them: cut as GPT-2 does, with <|endoftext|> in the vocabulary.
    """
    description = json.loads(tokenizer.to_str())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "clean_up_tokenization_spaces": False,
    }
    contents = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
    if description["pre_tokenizer"]["type"] == "ByteLevel" and tokenizer.token_to_id(END_OF_TEXT) is not None:
        vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        merges = [" ".join(pair) for pair in description["model"]["merges"]]
        contents["vocab.json"] = json.dumps(dict(vocab), ensure_ascii=False)
        contents["merges.txt"] = "\n".join(["#version: 0.2", *merges, ""])
    return contents


def _pre_tokenizer(merge_whitespace: bool) -> pre_tokenizers.PreTokenizer:
    if not merge_whitespace:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WHITESPACE_RUNS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _check_vocabulary(vocab_size: int, special_tokens: Sequence[str], min_frequency: int) -> None:
    needed = ALPHABET_SIZE + len(special_tokens)
    if vocab_size < needed:
        raise ConfigError(
            f"--vocab-size must be at least {needed} ({ALPHABET_SIZE} bytes and {len(special_tokens)} special "
            f"tokens), got {vocab_size}"
        )
    if min_frequency < 1:
        raise ConfigError(f"--min-frequency must be at least 1, got {min_frequency}")
    if not special_tokens or len(set(special_tokens)) != len(special_tokens):
        raise ConfigError("--special-tokens needs at least one token, and each only once")
    for token in special_tokens:
        # the decoder takes some non-ASCII characters for the bytes of ordinary tokens
        if len(token) < 2 or not token.isascii() or not token.isprintable():
            raise ConfigError(f"--special-tokens {token!r}: use two or more printable ASCII characters")
