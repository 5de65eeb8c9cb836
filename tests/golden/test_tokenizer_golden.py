"""Preprocessing against token files recorded from Megatron-LM's own tool, byte for byte.

A case is a directory with `corpus.jsonl`, tokenizer files (`NAME.model`, or `NAME-vocab.json` with
`NAME-merges.txt`) and `NAME_text_document.{bin,idx}`, made with `--append-eod`.
"""

from pathlib import Path

import pytest

from megatron.cli.preprocess_data import main


def tokenizers_of(directory: Path) -> dict[str, list[str]]:
    """Name of each tokenizer with recorded output, and the flags that build it."""
    found = {}
    for model in directory.glob("*.model"):
        found[model.stem] = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    for vocab in directory.glob("*-vocab.json"):
        name = vocab.name.removesuffix("-vocab.json")
        merges = directory / f"{name}-merges.txt"
        flags = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(vocab), "--merge-file", str(merges)]
        found[name] = flags
    return {name: flags for name, flags in found.items() if (directory / f"{name}_text_document.bin").exists()}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_preprocess_data(golden_dir: Path, tmp_path: Path, workers: str) -> None:
    compared = 0
    for corpus in sorted(golden_dir.rglob("corpus.jsonl")):
        for name, flags in tokenizers_of(corpus.parent).items():
            prefix = tmp_path / corpus.parent.name / name
            output = ["--append-eod", "--workers", workers, "--output-prefix", str(prefix)]
            assert main(["--input", str(corpus), *flags, *output]) == 0
            for ending in (".bin", ".idx"):
                recorded = corpus.parent / f"{name}_text_document{ending}"
                made = Path(f"{prefix}_text_document{ending}")
                assert made.read_bytes() == recorded.read_bytes(), f"{recorded} differs"
                compared += 1
    if not compared:
        pytest.skip(f"no corpus.jsonl with recorded token files below {golden_dir}")
