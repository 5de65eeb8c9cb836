"""The documents say what is: tables made from the code, files and links that exist, commands that parse.

The tables are written anew by: python -m tests.house.test_documents
"""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.cli import (
    check_cluster,
    convert_checkpoint,
    generate,
    merge_datasets,
    preprocess_data,
    reshard_checkpoint,
    train_tokenizer,
)
from megatron.config.load import load
from megatron.config.reference import markdown
from tests.house.files import ROOT, shown, tracked

RESULTS = ROOT / "benchmarks" / "results"
README, MEGATRON = ROOT / "README.md", ROOT / "README_Megatron_LM.md"
DOCUMENTS = [path for path in tracked() if path.suffix == ".md"]
# figures without a goal that the README shows, and explains beside the table
EXPLAINED = {"an asynchronous save adds to the run / a synchronous one"}
REGENERATE = "flags or results have changed: python -m tests.house.test_documents"


def exit_flags() -> str:
    """The rows about exits of the table of all flags."""
    return re.search(r"\*\*exits\*\*[^\n]*\n\n(\|.*?)\n\n", markdown(), re.S)[1] + "\n"


def measured() -> str:
    """What the kept results of the benchmarks say of their goals, one table for each kind of machine."""
    tables: dict[str, list[str]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for figure in result.get("figures", ()):
            if figure["goal"] is not None or figure["name"] in EXPLAINED:
                row = f"| `{result['benchmark']}` | {figure['name']} | {_value(figure)} | {_goal(figure)} |"
                tables.setdefault(_machine(result), []).append(row)
    head = "| `benchmarks/` | figure | measured | goal |\n|---|---|---|---|\n"
    return "\n".join(f"{machine}:\n\n{head}" + "\n".join(rows) + "\n" for machine, rows in tables.items())


def _value(figure: dict) -> str:
    """Value, quartiles where they were kept, and whether the goal is missed."""
    if figure["value"] is None:
        return "not measured"
    spread = "{:.3g}–{:.3g}".format(*figure["quartiles"]) if figure.get("quartiles") else ""
    said = [*([spread] if spread else []), *(["missed"] if figure["met"] is False else [])]
    return f"{figure['value']:.3g} {figure['unit']}".strip() + (f" ({', '.join(said)})" if said else "")


def _goal(figure: dict) -> str:
    return "none" if figure["goal"] is None else f"{'≥' if figure['at_least'] else '≤'} {figure['goal']:g}"


def _machine(result: dict) -> str:
    hardware, versions = result["hardware"], result["versions"]
    device = hardware["gpu"] or f"{hardware['cores']} cores of {hardware['processor']}"
    return f"{device}, Python {versions['python']}, torch {versions['torch']}"


# document: begin and end of each generated part, and what belongs there
GENERATED = {
    README: [
        ("<!-- exit flags -->", "<!-- exit flags end -->", exit_flags),
        ("<!-- benchmarks -->", "<!-- benchmarks end -->", measured),
    ],
    MEGATRON: [
        (
            "<!-- flags: python -m tests.house.test_documents writes this part -->",
            "<!-- flags end -->",
            markdown,
        )
    ],
}


def with_generated_part(path: Path) -> str:
    """The document's text with its tables as they should be."""
    text = path.read_text(encoding="utf-8")
    for begin, end, make in GENERATED[path]:
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{make()}\n{end}{rest.split(end)[1]}"
    return text


@pytest.mark.parametrize("path", GENERATED, ids=shown)
def test_tables_are_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == with_generated_part(path), REGENERATE


def commands(path: Path) -> Iterator[list[str]]:
    """The commands of a document's bash blocks, as words; comments and line continuations resolved."""
    for block in re.findall(r"^```bash\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z_]+=.*", word)]
            if words:
                yield words


def all_commands() -> list:
    return [
        pytest.param(words, id=f"{shown(path)}: {' '.join(words)[:50]}")
        for path in DOCUMENTS
        for words in commands(path)
    ]


_SIZES = "--num-layers 4 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --exit-layer-nums 2"
STORED = load(_SIZES.split()).config
PARSERS = {
    "tools/preprocess_data.py": preprocess_data,
    "tools/train_tokenizer.py": train_tokenizer,
    "tools/merge_datasets.py": merge_datasets,
    "tools/generate_text.py": generate,
    "tools/check_cluster.py": check_cluster,
    "tools/checkpoint/checkpoint_converter.py": convert_checkpoint,
    "tools/checkpoint/util.py": reshard_checkpoint,
}


@pytest.mark.parametrize("words", all_commands())
def test_commands_are_understood(words: list[str]) -> None:
    """Scripts exist, and every flag is one that they know."""
    if words[0] == "torchrun":
        words = ["python", *words[next(place for place, word in enumerate(words) if word.endswith(".py")) :]]
    program, script, *arguments = [*words, ""]
    if not (program in ("bash", "python") or program.startswith(".venv/bin/python")) or script.startswith("-"):
        return
    assert (ROOT / script).is_file()
    arguments = arguments[:-1]
    if script == "pretrain_early_exit_gpt.py":
        # with --load alone the checkpoint says what the model is
        base = STORED if "--load" in arguments and "--num-layers" not in arguments else None
        assert load(arguments, base=base).notes == ()
    elif script in PARSERS:
        PARSERS[script].parser().parse_args(arguments)
    elif script.endswith(".sh"):
        usage = (ROOT / script).read_text(encoding="utf-8").partition("\nset -")[0]
        assert all(word in usage for word in arguments if word.startswith("--"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=shown)
def test_links_and_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "mailto:"))]
    files = re.findall(r"`((?:tools|examples|tests|megatron|images|benchmarks)/[\w./-]+\.\w+)`", text)
    missing = [name for name in files if not (ROOT / name).exists()]
    for link in links:
        target, _, heading = link.partition("#")
        page = path.parent / target if target else path
        if not page.exists() or (heading and heading not in headings(page)):
            missing.append(link)
    assert missing == []


def headings(path: Path) -> set[str]:
    """Anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_generation_flags_are_those_of_the_tool() -> None:
    table = (
        README.read_text(encoding="utf-8").partition("For generation (")[2].partition("\n\n|")[2].partition("\n\n")[0]
    )
    named = set(re.findall(r"`(--[\w-]+)", table))
    known = {word for action in generate.parser()._actions for word in action.option_strings}
    assert len(named) >= 5
    assert named <= known


if __name__ == "__main__":
    for document in GENERATED:
        document.write_text(with_generated_part(document), encoding="utf-8")
