"""Hugging Face directories that are refused, each with one message."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.checkpoint.convert.huggingface import HfSource
from megatron.errors import CheckpointError, ConfigError
from tests.unit.checkpoint.convert.sources import change


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


def headless(directory: Path) -> None:
    path = next(p for p in directory.glob("model-*") if "lm_head.weight" in load_file(p))
    tensors = load_file(path)
    index = directory / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    del tensors["lm_head.weight"], places["lm_head.weight"]
    save_file(tensors, path)
    change(directory, index.name, weight_map=places)


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
    "tied": (
        changed(tie_word_embeddings=True),
        r"lm_head\.weight is not part of the model \(tie_word_embeddings is true\)",
    ),
    "headless": (headless, r"lm_head\.weight is missing \(tie_word_embeddings is false\)"),
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
