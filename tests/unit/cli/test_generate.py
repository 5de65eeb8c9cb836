import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.checkpoint import native
from megatron.checkpoint.state import MODEL, RunState
from megatron.cli.generate import main
from megatron.config.data import TokenizerConfig
from megatron.config.model import ExitConfig
from megatron.config.run import RunConfig
from megatron.config.stored import to_dict
from megatron.model.names import model_state
from megatron.testing.tiny import build_gpt, model_config
from megatron.tokenizer.null import NullTokenizer

PROMPT = "3 1 4 1 5"


def save(root: Path, exits: ExitConfig) -> str:
    shape = model_config("llama", seq_length=32, max_position_embeddings=32)
    words = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=59)
    model = build_gpt(shape, exits)
    facts = {
        "config": to_dict(replace(RunConfig(), model=shape, exits=exits, tokenizer=words)),
        "tokenizer": NullTokenizer(59).fingerprint,
    }
    native.save(root, 1, RunState({MODEL + n: part.view for n, part in model_state(model, 60).items()}, facts))
    return str(root)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("run"), ExitConfig(exit_layer_nums=(1, 3)))


@pytest.fixture
def run(checkpoint: str, capsys: pytest.CaptureFixture):
    def go(*argv: str, load: str = checkpoint, code: int = 0) -> str:
        assert main(["--load", load, "--device", "cpu", *argv]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return go


def test_prompt_text_and_summary(run) -> None:
    out = run("--prompt", PROMPT, "--tokens-to-generate", "6")
    text, _, summary, *_ = out.split("\n")
    assert text.startswith(PROMPT)
    assert "tokens/s; exit 1 0%, exit 3 0%, final 100%)" in summary
    assert run("--prompt", PROMPT, "--tokens-to-generate", "6").split("\n")[0] == text


def test_several_prompts_and_none(run) -> None:
    out = run("--prompt", PROMPT, "7 7", "--tokens-to-generate", "3")
    assert out.count("tokens/s") == 2
    assert "tokens/s" in run("--tokens-to-generate", "3")


def test_early_exits_are_marked(run) -> None:
    argv = ("--prompt", PROMPT, "--tokens-to-generate", "6", "--use-early-exit", "--early-exit-thres", "0")
    out = run(*argv, "--show-exits")
    assert out.startswith(f"{PROMPT}[1]")
    assert "exit 1 100%" in out
    assert "[1]" not in run(*argv)
    assert "exit 3 100%" in run(*argv, "--exit-layers", "3", "--max-deferred", "2")


def test_sampling_follows_the_seed(run) -> None:
    argv = ("--prompt", PROMPT, "--temperature", "2", "--top-k", "20")
    texts = [run(*argv, "--tokens-to-generate", "12", "--seed", seed).split("\n")[0] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_prompt_files(run, tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text(PROMPT)
    lines.write_text(json.dumps({"text": PROMPT}) + "\n\n" + json.dumps({"text": "9 9"}) + "\n")
    assert run("--prompt-file", str(plain), "--tokens-to-generate", "2").startswith(PROMPT)
    assert run("--prompt-file", str(lines), "--tokens-to-generate", "2").count("tokens/s") == 2


def test_comparison(run) -> None:
    out = run("--prompt", PROMPT, "7 7", "--compare", "0.9", "0", "--tokens-to-generate", "4", "--repeats", "1")
    assert [line.split()[0] for line in out.splitlines()] == ["threshold", "full", "0.9", "0"]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("--early-exit-thres", "0.5"), "--early-exit-thres needs --use-early-exit"),
        (("--max-deferred", "5"), "--max-deferred needs --use-early-exit"),
        (("--exit-layers", "1"), "--exit-layers needs"),
        (("--use-early-exit", "--exit-layers", "2"), "the model's exits are 1 3"),
        (("--compare", "0.5", "--temperature", "1"), "--compare is greedy"),
        (("--compare", "0.5", "--top-k", "4"), "leave out --top-k"),
        (("--compare", "0.5", "--show-exits"), "leave out --show-exits"),
        (("--compare", "0.5", "--repeats", "0"), "--repeats 0"),
        (("--repeats", "2"), "--repeats needs --compare"),
        (("--tokenizer-model", "somewhere"), "--tokenizer-model needs --tokenizer-type"),
        (("--prompt", "\udcff\udcfe"), "no UTF-8 text"),
        (("--top-k", "4", "--top-p", "0.5"), "both"),
        (("--tokens-to-generate", "0"), "at least one"),
        (("--tokens-to-generate", "32"), "32 positions"),
        (("--use-early-exit", "--early-exit-thres", "nan"), "nan"),
    ],
)
def test_flags_that_make_no_sense(run, argv: tuple[str, ...], named: str) -> None:
    error = run("--prompt", PROMPT, *argv, code=2)
    assert error.startswith("error: ")
    assert named in error


def test_interrupted(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron.cli.generate.load_model", interrupted)
    assert run("--prompt", PROMPT, code=130) == "\nstopped\n"


def test_bad_prompt_files(run, tmp_path: Path) -> None:
    lines = tmp_path / "b.jsonl"
    for content, named in (
        (' {"text": "1"}\n{', "line 2 is no JSON"),
        ('{"text": 3}', "line 1: expected"),
        ("", "no prompt"),
    ):
        lines.write_text(content)
        assert named in run("--prompt-file", str(lines), code=2)
    assert "cannot be read" in run("--prompt-file", str(tmp_path / "none.txt"), code=2)


def test_models_without_exits_and_missing_checkpoints(run, tmp_path: Path) -> None:
    plain = save(tmp_path / "plain", ExitConfig())
    assert "without exits" in run("--use-early-exit", "--prompt", PROMPT, load=plain, code=2)
    assert "final 100%" in run("--prompt", PROMPT, "--tokens-to-generate", "2", load=plain)
    assert "no checkpoint" in run(load=str(tmp_path / "none"), code=4)
