"""What comes out of a Hugging Face directory is what went in: tensors, exits, tokenizer, rows that no id uses."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.checkpoint import native
from megatron.checkpoint.convert.hf_export import write_hf
from megatron.checkpoint.convert.huggingface import HfSource
from megatron.checkpoint.state import MODEL, RunState
from megatron.config.data import TokenizerConfig
from megatron.config.model import ExitConfig
from megatron.config.run import RunConfig
from megatron.config.stored import to_dict
from megatron.errors import CheckpointError
from megatron.inference.build import load_model
from megatron.testing.tiny import build_gpt, model_config
from megatron.tokenizer.build import build_tokenizer
from megatron.tokenizer.training import tokenizer_files, train_byte_level_bpe
from tests.unit.checkpoint.convert.sources import IDS, ModelSource, assert_equal, logits, model_of, source, whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_every_bit_comes_back(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Model, exits and config, in one file and in several; our padding stays at home."""
    ours = source(family, dtype=dtype)
    expected = {name: ours.read(name) for name in ours.specs() if not name.endswith(".padding")}
    for name, most in (("one", 1 << 30), ("several", 20_000)):
        write_hf(ours, tmp_path / name, max_shard_bytes=most)
        assert_equal(whole(tmp_path / name), expected)
    back = HfSource(tmp_path / "several").config
    assert back.exits == ours.config.exits
    assert back.precision.params_dtype == (str(dtype).removeprefix("torch.") if dtype.itemsize == 2 else "float32")
    assert replace(back.model, max_position_embeddings=None, kv_channels=None) == replace(
        ours.config.model, ffn_hidden_size=ours.config.model.ffn_size
    )


def test_the_model_computes_the_same(exported: Path) -> None:
    tokens = torch.randint(0, IDS, (2, 16), generator=torch.Generator().manual_seed(0))
    expected, found = (logits(model_of(each), tokens) for each in (source(), HfSource(exported)))
    assert sorted(found) == ["1", "3", "final"]
    for head, each in found.items():
        assert torch.equal(each[..., :IDS], expected[head][..., :IDS])


def test_files_as_transformers_names_them(exported: Path) -> None:
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    stored = {name: set(load_file(exported / name)) for name in set(index["weight_map"].values())}
    assert {name: file for file, names in stored.items() for name in names} == index["weight_map"]
    assert len(stored) > 2 and all(name.startswith("model-0000") for name in stored)
    sizes = {name: (exported / name).stat().st_size for name in stored}
    assert max(sizes.values()) < 42_000 and sum(sizes.values()) > index["metadata"]["total_size"]
    assert not any(name.startswith("exits.") for name in index["weight_map"])
    assert all(name.startswith(("exits.1.", "exits.3.")) for name in load_file(exported / "exits.safetensors"))
    config = json.loads((exported / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"], config["torch_dtype"]) == ("llama", IDS, "float32")
    # Each query head's rows, then those of keys and values, where ours lie by group.
    qkv = source().read("layers.0.attention.qkv.weight").view(2, 4, 8, 32)
    query = {name: t for file in stored for name, t in load_file(exported / file).items()}
    assert torch.equal(query["model.layers.0.self_attn.q_proj.weight"], qkv[:, :2].reshape(32, 32))
    assert torch.equal(query["model.layers.0.self_attn.v_proj.weight"], qkv[:, 3].reshape(16, 32))


def write_tokenizer(directory: Path, **settings: Any) -> int:
    words = train_byte_level_bpe(["one two three " * 20, "two one"], 270, **settings)
    for name, content in tokenizer_files(words, "<|endoftext|>").items():
        (directory / name).write_text(content, encoding="utf-8")
    (directory / "generation_config.json").write_text('{"temperature": 0.5}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return words.get_vocab_size()


def with_tokenizer(directory: Path, family: str, surplus: int) -> int:
    """A directory whose model has `surplus` rows more than its tokenizer ids."""
    directory.mkdir()
    ids = write_tokenizer(directory)
    exits = ExitConfig((2,), untie_exit_output_weights=True)
    config = RunConfig(model=model_config(family), exits=exits)
    rows = ids + surplus
    write_hf(ModelSource(build_gpt(config.model, exits, rows, rows), config, rows), directory.with_name("bare"))
    for path in directory.with_name("bare").iterdir():
        path.rename(directory / path.name)
    return ids


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_rows_beyond_the_tokenizer_are_padding(family: str, tmp_path: Path) -> None:
    """They are kept apart, come back where they were, and are left out once the model isn't as it came."""
    ids = with_tokenizer(tmp_path / "model", family, surplus=7)
    found = HfSource(tmp_path / "model")
    vocabulary = [name for name in found.specs() if name.endswith(("word.weight", "output.weight"))]
    assert len(vocabulary) == (3 if family == "llama" else 2)
    for name in vocabulary:
        assert found.read(name).shape == (ids, 32) and found.read(f"{name}.padding").shape == (7, 32)
    write_hf(found, tmp_path / "back")
    for name in ("model.safetensors", "exits.safetensors"):
        assert_equal(load_file(tmp_path / "model" / name), load_file(tmp_path / "back" / name))
    found.facts = {}
    write_hf(found, tmp_path / "trained")
    assert json.loads((tmp_path / "trained" / "config.json").read_text())["vocab_size"] == ids
    assert_equal(whole(tmp_path / "trained"), {n: found.read(n) for n in found.specs() if not n.endswith(".padding")})


def test_exits_added_since_get_the_same_rows(tmp_path: Path) -> None:
    """A head without padding of its own is written with zeros there, so that all vocabularies are of one size."""
    ids = with_tokenizer(tmp_path / "model", "llama", surplus=7)
    found = HfSource(tmp_path / "model")
    added = {name: spec for name, spec in found.specs().items() if name != "exits.2.output.weight.padding"}
    found.specs = lambda: added
    write_hf(found, tmp_path / "out")
    back = HfSource(tmp_path / "out")
    assert back.specs()["exits.2.output.weight"].shape == (ids, 32)
    assert not back.read("exits.2.output.weight.padding").any()
    assert torch.equal(back.read("output.weight.padding"), HfSource(tmp_path / "model").read("output.weight.padding"))


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    """Into a native checkpoint that generates at once, and out again with all that lay beside it."""
    with_tokenizer(tmp_path / "model", "llama", surplus=3)
    found = HfSource(tmp_path / "model")
    assert found.config.tokenizer.tokenizer_type == "HuggingFaceTokenizer"
    carried = {path.name for path in found.tokenizer_files()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"} <= carried
    words = build_tokenizer(**asdict(found.config.tokenizer))
    facts = {"config": to_dict(found.config), "tokenizer": words.fingerprint}
    state = RunState({MODEL + name: found.read(name) for name in found.specs()}, facts)
    native.save(tmp_path / "native", 0, state, found.tokenizer_files())
    (tmp_path / "model").rename(tmp_path / "gone")
    gpt, inside, config = load_model(tmp_path / "native", device="cpu")
    assert inside.fingerprint == words.fingerprint and inside.tokenize("one two") == words.tokenize("one two")
    assert (config.exits.exit_layer_nums, config.model.norm_epsilon) == ((2,), 1e-5)
    tokens = torch.tensor([[1, 2, 3]])
    mine, theirs = logits(gpt, tokens), logits(model_of(HfSource(tmp_path / "gone")), tokens)
    assert torch.equal(mine["2"][..., : words.vocab_size], theirs["2"][..., : words.vocab_size])

    write_hf(HfSource(tmp_path / "gone"), tmp_path / "back")
    for name in carried:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "gone" / name).read_bytes()


def test_token_ids_and_names_of_other_tokenizers(tmp_path: Path) -> None:
    """A GPT-2 BPE of ours has files of any name; transformers looks for vocab.json and merges.txt."""
    write_tokenizer(tmp_path, merge_whitespace=False)
    words, merges = (tmp_path / "vocab.json").rename(tmp_path / "my-vocab.json"), tmp_path / "merges.txt"
    tokenizer = TokenizerConfig("GPT2BPETokenizer", vocab_file=str(words), merge_file=str(merges))
    ours = source("gpt")
    ours.config = replace(ours.config, tokenizer=tokenizer)
    ours._files = (words, merges)
    write_hf(ours, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.json").read_bytes() == words.read_bytes()
    end = json.loads(words.read_text())["<|endoftext|>"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == end
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "GPT2Tokenizer"


def test_a_tokenizer_of_more_ids_is_refused(tmp_path: Path) -> None:
    write_hf(source(), tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"its tokenizer has 2\d\d ids, the model rows for 60"):
        HfSource(tmp_path / "model")


def test_torch_files_are_read_without_running_them(exported: Path, model: Path) -> None:
    """Tensors of pytorch_model.bin, and nothing else that a pickle may say."""
    tensors = {name: t for path in model.glob("model-*") for name, t in load_file(path).items()}
    for path in [*model.glob("model-*"), model / "model.safetensors.index.json"]:
        path.unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    assert_equal(whole(model), whole(exported))

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(model / "ran"),)

    torch.save(tensors | {"model.norm.weight": Hostile()}, model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: refused: it asks for \w+\.mkdir"):
        HfSource(model)
    torch.save(tensors | {"step": 3}, model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"'step' is no floating-point tensor.*safe_serialization"):
        HfSource(model)
    assert not (model / "ran").exists()


def test_names_of_a_bare_base_model_and_computed_buffers(tmp_path: Path) -> None:
    """GPT-2's first files leave out the prefix and hold masks; a tied head may be stored twice."""
    write_hf(source("gpt", ExitConfig()), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    expected = whole(tmp_path / "model")
    extra = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "lm_head.weight": tensors["wte.weight"].clone()}
    save_file(tensors | extra, path)
    assert_equal(whole(tmp_path / "model"), expected)
    save_file(tensors | {"lm_head.weight": tensors["wte.weight"] + 1}, path)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not part of the model"):
        HfSource(tmp_path / "model")
