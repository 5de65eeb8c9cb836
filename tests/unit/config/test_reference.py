"""`--help` and the documentation's tables show every flag."""

import pytest

from megatron.config.fields import all_flags, by_name
from megatron.config.reference import describe, help_text, markdown
from megatron.config.refused import accepted, refused


def test_help_shows_every_flag() -> None:
    lines = help_text("pretrain.py").splitlines()
    for flag in all_flags():
        assert any(line.startswith(f"  {flag.flag}") for line in lines), flag.flag


@pytest.mark.parametrize("columns", ["40", "80", "300"])
def test_help_fits_the_terminal(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    width = max(72, min(110, int(columns)))
    for line in help_text("pretrain.py").splitlines():
        assert len(line) <= max(width, 105), line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("seed", "(default: 1234)"),
        ("min_lr", "(default: 0)"),
        ("initial_loss_scale", "(default: 4294967296)"),
        ("save_optim", "Switch off: save the optimizer's state."),
        ("bias_gelu_fusion", "Switch off: GELU"),
        ("norm_epsilon", "[also --layernorm-epsilon]"),
        ("exit_norm", "[--use-exit-norm = own]"),
        ("tokenizer_type", "One of GPT2BPETokenizer"),
    ],
)
def test_descriptions(name: str, words: str) -> None:
    assert words in describe(by_name()[name])


def test_markdown_holds_the_three_classes() -> None:
    text = markdown()
    for title in ("### Honoured", "### Accepted without effect", "### Refused"):
        assert title in text
    for flag in (*(flag.flag for flag in all_flags()), *accepted(), *refused()):
        assert f"`{flag}" in text, flag
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {3}
