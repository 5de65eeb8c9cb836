"""GPT-2's byte-level BPE from its two files, vocab.json and merges.txt."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron.errors import ConfigError
from megatron.tokenizer.fast import FastTokenizer

END_OF_TEXT = "<|endoftext|>"


class GPT2BPETokenizer(FastTokenizer):
    """Byte-level BPE; `<|endoftext|>` separates documents but is plain text where it occurs in a text."""

    def __init__(self, vocab_file: Path, merge_file: Path) -> None:
        """ConfigError where a file is unreadable or the two don't belong together."""
        vocab = _read_vocab(vocab_file)
        merges = _read_merges(merge_file, vocab, vocab_file)
        try:
            library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
        except Exception as err:  # the library raises nothing more specific, as for half a surrogate pair
            files = f"--vocab-file {vocab_file} and --merge-file {merge_file}"
            raise ConfigError(f"{files} make no tokenizer: {err}") from err
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        library.decoder = decoders.ByteLevel()
        super().__init__(library, [vocab_file, merge_file], eos=vocab[END_OF_TEXT])


def _read_vocab(path: Path) -> dict[str, int]:
    try:
        vocab = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise ConfigError(f"--vocab-file {path} cannot be read: {err}") from err
    if not isinstance(vocab, dict) or not all(type(i) is int and 0 <= i < 2**31 for i in vocab.values()):
        raise ConfigError(f"--vocab-file {path} must be a JSON object of token to id, as GPT-2's vocab.json")
    if END_OF_TEXT not in vocab:
        raise ConfigError(f"--vocab-file {path} has no {END_OF_TEXT}, which separates documents")
    return vocab


def _read_merges(path: Path, vocab: dict[str, int], vocab_file: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as err:
        raise ConfigError(f"--merge-file {path} cannot be read: {err}") from err
    merges = []
    for number, line in enumerate(lines, start=1):
        if (number == 1 and line.startswith("#version")) or not line.strip():
            continue
        pair = line.split()
        if len(pair) != 2:
            raise ConfigError(f"--merge-file {path}, line {number}: expected two tokens, got {line[:80]!r}")
        missing = [token for token in (*pair, "".join(pair)) if token not in vocab]
        if missing:
            raise ConfigError(
                f"--merge-file {path}, line {number}: {missing[0]!r} is not in {vocab_file}; "
                "the two files must come from one tokenizer"
            )
        merges.append((pair[0], pair[1]))
    return merges
