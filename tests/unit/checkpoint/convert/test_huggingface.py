"""Hugging Face directories without transformers: what is read, what is refused, and that a refusal leaves nothing."""

import errno
import json
import os
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron import faults
from megatron.checkpoint import native
from megatron.checkpoint.convert import hf_config
from megatron.checkpoint.convert.hf_export import write_hf
from megatron.checkpoint.convert.huggingface import HfSource
from megatron.checkpoint.convert.megatron_core import refuse_megatron_core
from megatron.checkpoint.state import MODEL, RunState
from megatron.config.data import TokenizerConfig
from megatron.config.model import ExitConfig
from megatron.config.run import RunConfig
from megatron.config.stored import to_dict
from megatron.errors import CheckpointError, ConfigError, StorageError
from megatron.inference.build import load_model
from megatron.testing.tiny import build_gpt, model_config
from megatron.tokenizer.build import build_tokenizer
from megatron.tokenizer.training import tokenizer_files, train_byte_level_bpe
from tests.unit.checkpoint.convert.sources import ModelSource, logits, model_of

IDS, ROWS = 60, 64
EXITS = ExitConfig((1, 3), exit_norm="own", untie_exit_output_weights=True)


def source(family: str = "llama", exits: ExitConfig = EXITS, dtype: torch.dtype = torch.float32, **changes: Any):
    config = RunConfig(model=model_config(family, **changes), exits=exits)
    return ModelSource(build_gpt(config.model, exits, IDS, ROWS, dtype), config, IDS)


def whole(directory: Path) -> dict[str, Tensor]:
    """Everything a source gives, by native name."""
    found = HfSource(directory)
    return {name: found.read(name) for name in found.specs()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    assert all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with exits in several files."""
    directory = tmp_path_factory.mktemp("exported") / "model"
    write_hf(source(), directory, max_shard_bytes=40_000)
    return directory


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    directory = tmp_path / "model"
    directory.mkdir()
    for path in exported.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def change(directory: Path, name: str, **changes: Any) -> None:
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


# --- tokenizers, and rows that no id uses -------------------------------------------------------------------------


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


# --- other ways to store the same ---------------------------------------------------------------------------------


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


# --- refusals -----------------------------------------------------------------------------------------------------


def shard(directory: Path, number: int = 1) -> Path:
    return next(directory.glob(f"model-0000{number}-*"))


def cut(directory: Path) -> None:
    content = shard(directory).read_bytes()
    shard(directory).write_bytes(content[: len(content) // 2])


def huge_header(directory: Path) -> None:
    shard(directory).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def integers(directory: Path) -> None:
    tensors = load_file(shard(directory))
    save_file({name: tensor.to(torch.int32) for name, tensor in tensors.items()}, shard(directory))


def other_shape(directory: Path) -> None:
    tensors = load_file(shard(directory))
    save_file(tensors | {"model.layers.0.mlp.gate_proj.weight": torch.ones(3, 32)}, shard(directory))


def extra(directory: Path) -> None:
    tensors = load_file(shard(directory))
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, shard(directory))


def reindexed(place: object) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        index = "model.safetensors.index.json"
        places = json.loads((directory / index).read_text())["weight_map"]
        change(directory, index, weight_map=places | {"lm_head.weight": place})

    return damage


def reindexed_name(directory: Path) -> None:
    index = "model.safetensors.index.json"
    places = json.loads((directory / index).read_text())["weight_map"]
    change(directory, index, weight_map=places | {"model.lost.weight": shard(directory).name})


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(content)


def changed(name: str = "config.json", **changes: Any) -> Callable[[Path], None]:
    return lambda directory: change(directory, name, **changes)


def pipe(directory: Path) -> None:
    path = shard(directory)
    path.unlink()
    os.mkfifo(path)


def infinite(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 1e999'))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, r"model-00001-of-\d+\.safetensors is damaged or no safetensors file"),
    "empty": (lambda d: shard(d).write_bytes(b""), "damaged or no safetensors file"),
    "huge header": (huge_header, "damaged or no safetensors file"),
    "missing shard": (lambda d: shard(d).unlink(), r"model-00001-of-\d+\.safetensors is missing: copy"),
    "pipe": (pipe, r"safetensors is missing"),
    "no tensors": (lambda d: (d / "model.safetensors.index.json").unlink(), r"holds no model\.safetensors"),
    "integers": (integers, "is of type I32, and only"),
    "other shape": (other_shape, r"gate_proj\.weight is \[3, 32\] instead of \[48, 32\]"),
    "extra": (extra, r"q_proj\.bias is not part of the model"),
    "outside": (reindexed("../secret.safetensors"), r"refused: '\.\./secret\.safetensors' is no name of a file"),
    "absolute": (reindexed("/etc/passwd"), "refused: '/etc/passwd' is no name"),
    "no name": (reindexed(["a"]), "is no name of a file"),
    "elsewhere": (reindexed_name, r"index\.json lists model\.lost\.weight, which model-00001-of.* doesn't hold"),
    "index": (text("model.safetensors.index.json", "[]"), "holds no JSON object"),
    "no config": (lambda d: (d / "config.json").unlink(), r"cannot read .*config\.json"),
    "not a number": (changed(rms_norm_eps=float("nan")), "NaN is no number of JSON"),
    "infinite": (infinite, "rope_theta is inf, not a number"),
    "no JSON": (text("config.json", '{"model_type": '), r"config\.json is damaged"),
    "deep": (text("config.json", '{"a":' * 100_000), r"config\.json is damaged"),
    "text as size": (changed(hidden_size="32"), "hidden_size is '32', not a number"),
    "broken size": (changed(hidden_size=32.5), "hidden_size is 32.5, not a whole number"),
    "negative": (changed(num_hidden_layers=-1), "num_hidden_layers is -1"),
    "many layers": (changed(num_hidden_layers=10_000_000), "it says 10000000 layers, but there are"),
    "wide": (changed(hidden_size=1 << 40), "hidden_size is 1099511627776, not 1 to"),
    "wide MLP": (changed(intermediate_size=1 << 24, head_dim=1 << 24), "instead of|no model is that large"),
    "other vocabulary": (changed(vocab_size=59), r"it says vocab_size 59 .*, but .* is \[60, 32\]"),
    "unknown": (changed(model_type="mixtral"), "'mixtral' is none of those that are read: llama, mistral, qwen2"),
    "no type": (changed(model_type=None), "model_type '' is none"),
    "classifier": (changed(architectures=["LlamaForSequenceClassification"]), "only language models are read"),
    "experts": (changed(num_local_experts=8), "a mixture of experts, which is not supported"),
    "quantised": (changed(quantization_config={"bits": 4}), "quantised weights"),
    "attention bias": (changed(attention_bias=True), "attention_bias and mlp_bias differ"),
    "partial": (changed(partial_rotary_factor=0.5), "partial rotary positions"),
    "activation": (changed(hidden_act="relu"), "hidden_act 'relu' is not supported"),
    "yarn": (changed(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope_type 'yarn' is not supported"),
    "no factor": (changed(rope_scaling={"type": "linear"}), "lacks factor"),
    "tied": (changed(tie_word_embeddings=True), r"lm_head\.weight is not part of the model"),
    "flag": (changed(tie_word_embeddings="no"), "tie_word_embeddings is 'no', not true or false"),
    "heads": (changed(num_attention_heads=3), "--num-query-groups 2 does not divide|instead of"),
    "exits' version": (changed("exits.json", version=2), r"exits\.json is no description of exits"),
    "exits' key": (changed("exits.json", exits=3), r"exits\.json.*exits"),
    "exit too deep": (changed("exits.json", exit_layer_nums=[1, 9]), "9 lies beyond the model's depth"),
    "exit lost": (changed("exits.json", exit_layer_nums=[1, 2]), r"exits\.2\.norm\.weight is missing"),
    "exits' tensors": (lambda d: (d / "exits.safetensors").unlink(), r"exits\.1\.norm\.weight is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_refused_with_one_message(name: str, model: Path) -> None:
    damage, message = DAMAGES[name]
    damage(model)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        HfSource(model)
    assert str(model) in str(caught.value) and len(str(caught.value)) < 2500


MIXED = {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 4}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "window for some": (MIXED | {"max_window_layers": 2}, "layers differ in attention"),
    "kinds of layers": (
        MIXED | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        "layers differ in attention",
    ),
    "all biases": ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is true"),
    "groups unsaid": ({"num_key_value_heads": None}, "lacks num_key_value_heads"),
    "rope by layer": ({"rope_parameters": {"full_attention": {}}}, "rope_type 'default' is not supported"),
    "GPT-2's scaling": ({"model_type": "gpt2", "scale_attn_weights": False}, "attention without scaling"),
    "GPT-2's activation": ({"model_type": "gpt2", "activation_function": "relu"}, "'relu' is not supported"),
}  # fmt: skip
QWEN = {
    "model_type": "qwen2", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 4, "intermediate_size": 48, "max_position_embeddings": 32768,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_features_that_are_refused(name: str) -> None:
    changes, message = CONFIGS[name]
    with pytest.raises(CheckpointError, match=f"^a file.*{message}"):
        hf_config.model_of(hf_config.Fields(QWEN | changes, "a file"))


def test_windows_that_are_read() -> None:
    """Qwen's window counts where it is used, in all layers; Mistral's where it isn't null."""

    def window(**changes: Any) -> int | None:
        return hf_config.model_of(hf_config.Fields(QWEN | changes, "a file")).window_size

    assert window(sliding_window=8, max_window_layers=0) is None
    assert window(sliding_window=8, max_window_layers=0, use_sliding_window=True) == 8
    assert window(sliding_window=8, max_window_layers=4, use_sliding_window=True) is None
    assert window(model_type="mistral", sliding_window=8) == 8
    assert window(model_type="mistral", sliding_window=None) is None
    assert window(model_type="mistral") == 4096


def test_a_long_context_is_no_training_length() -> None:
    found = hf_config.model_of(hf_config.Fields(QWEN, "a file"))
    assert (found.max_position_embeddings, found.seq_length) == (32768, 4096)


# --- writing ------------------------------------------------------------------------------------------------------

UNWRITABLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "norms around zero": ("llama", {"apply_layernorm_1p": True}, "--apply-layernorm-1p"),
    "post-norm": ("gpt", {"apply_residual_connection_post_layernorm": True}, "--apply-residual-connection"),
    "relu": ("gpt", {"squared_relu": True}, "gpt2 comes nearest, but: an MLP with relu2"),
    "groups": ("gpt", {"group_query_attention": True}, "--num-query-groups 1"),
    "turning": ("llama", {"rotary_percent": 0.5}, "--rotary-percent 0.5"),
    "no positions": ("gpt", {"position_embedding_type": "none"}, "--position-embedding-type none"),
    "window and norms": ("llama", {"window_size": 4, "qk_layernorm": True, "add_qkv_bias": True}, "comes nearest"),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_models_that_no_architecture_has(name: str, tmp_path: Path) -> None:
    family, changes, message = UNWRITABLE[name]
    with pytest.raises(ConfigError, match=message):
        write_hf(source(family, ExitConfig(), **changes), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced(tmp_path: Path) -> None:
    """But an empty directory."""
    target = tmp_path / "out"
    target.mkdir()
    write_hf(source(), target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(StorageError, match="out exists and is not replaced"):
        write_hf(source("gpt"), target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="file exists and is not replaced"):
        write_hf(source(), tmp_path / "file")


def test_a_failure_at_any_file_operation_leaves_nothing(tmp_path: Path) -> None:
    """A full disk, wherever it is met."""
    ours = source(exits=ExitConfig((2,), exit_norm="own"))
    with faults.armed() as passed:
        write_hf(ours, tmp_path / "counted", max_shard_bytes=60_000)
    points = list(passed)
    assert {"safetensors.open", "safetensors.write", "huggingface.json", "huggingface.copy"} <= set(points)
    for number in sorted({points.index(point) + 1 for point in points} | {len(points) // 2}):
        with faults.armed(f"@{number}:enospc"), pytest.raises(StorageError, match=r"cannot write .*out"):
            write_hf(ours, tmp_path / "out", max_shard_bytes=60_000)
        assert [path.name for path in tmp_path.iterdir()] == ["counted"], points[number - 1]


def test_a_source_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    ours = source()

    def read(name: str) -> Tensor:
        if name.startswith("layers.2"):
            raise CheckpointError(f"{name} cannot be read: {os.strerror(errno.EIO)}")
        return torch.zeros(ours.specs()[name].shape)

    ours.read = read
    with pytest.raises(CheckpointError, match="cannot be read"):
        write_hf(ours, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- Megatron-core ------------------------------------------------------------------------------------------------


def test_distributed_checkpoints_of_megatron_core_are_named(exported: Path, tmp_path: Path) -> None:
    iteration = tmp_path / "iter_0000010"
    iteration.mkdir()
    (iteration / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (iteration / "common.pt").write_bytes(b"")
    for root in (tmp_path, iteration):
        with pytest.raises(
            CheckpointError, match="iter_0000010 is a distributed checkpoint of Megatron-core"
        ) as caught:
            refuse_megatron_core(root)
        assert "export_ckpt" in str(caught.value) and "\n" not in str(caught.value)
    for other in (exported, tmp_path / "nothing"):
        refuse_megatron_core(other)  # raises nothing
    (iteration / "metadata.json").write_text("no JSON")
    refuse_megatron_core(tmp_path)
