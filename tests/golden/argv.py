"""Recorded command lines, made to run here: inputs from the golden directory, outputs into a temporary one."""

from pathlib import Path

INPUTS = (
    *("--tokenizer-model", "--vocab-file", "--merge-file", "--load", "--config", "--schedule-file"),
    *("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path"),
)
OUTPUTS = ("--save", "--data-cache-path", "--tensorboard-dir", "--metrics-file", "--wandb-save-dir", "--trace")


def redirect(argv: list[str], golden_dir: Path, out: Path) -> list[str]:
    """The same flags with paths that exist: relative inputs made absolute, outputs moved under `out`."""
    result, flag = [], ""
    for word in argv:
        if word.startswith("--"):
            flag = word
        elif flag in OUTPUTS:
            word = str(out / word)
        elif flag in INPUTS and not _is_number(word):
            word = str(golden_dir / word)
        result.append(word)
    return result


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
