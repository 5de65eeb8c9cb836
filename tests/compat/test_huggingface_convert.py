"""Hugging Face directories in and out against transformers' own models, at tiny sizes with random weights."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron.checkpoint import native
from megatron.checkpoint.convert.hf_export import write_hf
from megatron.checkpoint.convert.huggingface import HfSource
from megatron.checkpoint.state import MODEL, RunState
from megatron.config.data import TokenizerConfig
from megatron.config.model import ExitConfig, ModelConfig
from megatron.config.run import RunConfig
from megatron.testing.tiny import build_gpt, model_config
from megatron.tokenizer.build import build_tokenizer
from megatron.tokenizer.training import tokenizer_files, train_byte_level_bpe
from tests.unit.checkpoint.convert.sources import ModelSource, logits, model_of

transformers = pytest.importorskip("transformers", reason="needs the hf extra")

from megatron.checkpoint.convert.modeling_ee_llm import EarlyExitForCausalLM  # noqa: E402 - it needs transformers

VOCAB = 61  # no multiple of anything: padding is ours alone
SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=3, eos_token_id=5,
)  # fmt: skip
GPT2 = dict(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=3, eos_token_id=5)
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_mha_tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama_mqa_wide_heads": ("Llama", {"num_key_value_heads": 1, "head_dim": 16}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_gelu": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear_rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}}),
    "mistral_window": ("Mistral", {"sliding_window": 7}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gpt2": ("GPT2", {}),
    "gpt2_untied_erf": ("GPT2", {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 40}),
}
EXITS = {
    "plain": ExitConfig((1, 3)),
    "final_norm": ExitConfig((2,), exit_norm="final"),
    "own": ExitConfig((1, 3), exit_norm="own", untie_exit_output_weights=True, exit_layer_weight=(0.25, 0.5)),
    "mlp": ExitConfig((3, 2), use_exit_mlp=True, exit_norm="own"),
    "block": ExitConfig((1, 4), use_exit_block=True, exit_norm="final"),
    "pre": ExitConfig((1, 3), pre_exit=True, use_exit_block=True, untie_exit_output_weights=True),
}  # fmt: skip


def hf_model(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    family, changes = FAMILIES[name]
    sizes = GPT2 if family == "GPT2" else SIZES
    settings = getattr(transformers, f"{family}Config")(**(sizes | changes), attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2 if parameter.dim() > 1 else 0.1).add_(1.0 if parameter.dim() == 1 else 0.0)
    return model.eval()


def tokens(vocab: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def hf_logits(model: torch.nn.Module) -> Tensor:
    return model(tokens()).logits


def loaded(directory: Path, **kwargs: Any) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", **kwargs).eval()


def tensors_in(directory: Path) -> dict[str, Tensor]:
    return {name: t for path in directory.glob("model*.safetensors") for name, t in load_file(path).items()}


def assert_equal_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("name", FAMILIES)
def test_families_in_and_back(name: str, tmp_path: Path) -> None:
    """Their model computes the same in ours; written again it is theirs bit for bit, config included."""
    theirs = hf_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    source = HfSource(tmp_path / "theirs")
    ours = logits(model_of(source), tokens())["final"][..., :VOCAB]
    torch.testing.assert_close(ours, hf_logits(theirs), rtol=1e-4, atol=1e-4)

    write_hf(source, tmp_path / "back")
    assert_equal_tensors(tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "back"))
    back = loaded(tmp_path / "back")
    assert torch.equal(hf_logits(back), hf_logits(theirs))
    noise = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "embd_pdrop"}
    first, second = (
        transformers.AutoConfig.from_pretrained(tmp_path / which).to_dict() for which in ("theirs", "back")
    )
    differing = {key for key in first if key not in noise and first[key] != second.get(key)}
    # None and what it stands for; a window that isn't used
    assert differing <= {"n_inner", "max_window_layers"}, {key: (first[key], second.get(key)) for key in differing}


def test_through_a_native_checkpoint(tmp_path: Path) -> None:
    """What a conversion to our format and back leaves of bf16 weights in several files: every bit."""
    hf_model("qwen2_tied", torch.bfloat16).save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    source = HfSource(tmp_path / "theirs")
    assert source.config.precision.bf16
    state = RunState({MODEL + name: source.read(name) for name in source.specs()})
    saved = native.read(native.save(tmp_path / "native", 0, state))
    for name, spec in source.specs().items():
        tensor = saved.tensors[MODEL + name]
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), name

    class Native:
        config, iteration, facts, specs = source.config, 0, source.facts, source.specs

        def read(self, name: str) -> Tensor:
            return saved.tensors[MODEL + name]

        def tokenizer_files(self) -> list[Path]:
            return []

        def close(self) -> None:
            saved.tensors.clear()

    write_hf(Native(), tmp_path / "back", max_shard_bytes=20_000)
    shards = sorted(path.name for path in (tmp_path / "back").glob("model-*.safetensors"))
    assert len(shards) > 2 and all((tmp_path / "back" / name).stat().st_size < 22_000 for name in shards)
    assert_equal_tensors(tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "back"))
    assert loaded(tmp_path / "back").dtype == torch.bfloat16


OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("llama", {"window_size": 7}),
    "Qwen2ForCausalLM": ("llama", {"add_qkv_bias": True}),
    "Qwen3ForCausalLM": ("llama", {"qk_layernorm": True}),
    "GPT2LMHeadModel": ("gpt", {}),
}


def own_model(architecture: str, exits: ExitConfig, **changes: Any) -> ModelSource:
    family, settings = OURS[architecture]
    settings = dict(seq_length=24, max_position_embeddings=32) | settings | changes
    config = RunConfig(model=model_config(family, **settings), exits=exits)
    gpt = build_gpt(config.model, exits, vocab_size=VOCAB, padded_vocab_size=64).eval()
    source = ModelSource(gpt, config, VOCAB)
    source.expected = {head: each[..., :VOCAB] for head, each in logits(gpt, tokens()).items()}
    return source


@pytest.mark.parametrize("kind", EXITS)
@pytest.mark.parametrize("architecture", OURS)
def test_exits_out(architecture: str, kind: str, tmp_path: Path) -> None:
    """transformers loads the backbone and knows of no exits; the shipped file computes all of them."""
    source = own_model(architecture, EXITS[kind])
    write_hf(source, tmp_path / "out")
    stock = loaded(tmp_path / "out")
    assert type(stock).__name__ == architecture
    torch.testing.assert_close(hf_logits(stock), source.expected["final"], rtol=1e-4, atol=1e-4)

    model = EarlyExitForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        found = model(tokens())
    assert sorted(found.exit_logits) == sorted(EXITS[kind].exit_layer_nums)
    torch.testing.assert_close(found.logits, source.expected["final"], rtol=1e-4, atol=1e-4)
    for number, theirs in found.exit_logits.items():
        torch.testing.assert_close(theirs, source.expected[str(number)], rtol=1e-4, atol=1e-4)

    back = HfSource(tmp_path / "out")
    assert back.config.exits == EXITS[kind]
    ours = {name: source.read(name) for name in source.specs() if not name.endswith(".padding")}
    assert_equal_tensors(ours, {name: back.read(name) for name in back.specs()})


def test_exits_are_remote_code_for_this_directory_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoModel, allowed to run the shipped file, hands out early exits for this directory and no other."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = own_model("LlamaForCausalLM", EXITS["own"])
    write_hf(source, tmp_path / "exits")
    write_hf(own_model("LlamaForCausalLM", ExitConfig()), tmp_path / "plain")
    model = transformers.AutoModel.from_pretrained(tmp_path / "exits", trust_remote_code=True)
    assert type(model).__name__ == "EarlyExitForCausalLM"
    assert not type(model).__module__.startswith("megatron")
    with torch.no_grad():
        found = model(tokens(), attention_mask=torch.ones(2, 24, dtype=torch.int64)).exit_logits
    for number, theirs in found.items():
        torch.testing.assert_close(theirs, source.expected[str(number)], rtol=1e-4, atol=1e-4)
    for which in ("plain", "exits"):
        assert type(transformers.AutoModel.from_pretrained(tmp_path / which)).__name__ == "LlamaModel"
    assert not (tmp_path / "plain" / "exits.json").exists()
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@pytest.mark.parametrize("kind", ["GPT2BPETokenizer", "HuggingFaceTokenizer"])
def test_the_tokenizer_that_transformers_finds(kind: str, tmp_path: Path) -> None:
    """The same ids, whatever architecture they are for."""
    words = train_byte_level_bpe(["one two three " * 20, "two one"], 270, merge_whitespace=False)
    names = {"vocab.json": "v.json", "merges.txt": "m.txt"} if kind == "GPT2BPETokenizer" else {}
    for name, content in tokenizer_files(words, "<|endoftext|>").items():
        (tmp_path / names.get(name, name)).write_text(content, encoding="utf-8")
    asked = TokenizerConfig(kind, str(tmp_path), str(tmp_path / "v.json"), str(tmp_path / "m.txt"))
    ours = build_tokenizer(**asdict(asked))
    config = RunConfig(model=model_config("llama"), tokenizer=asked)
    ids = ours.vocab_size
    write_hf(ModelSource(build_gpt(config.model, None, ids, ids), config, ids, tuple(ours.files())), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "one two, three two!"
    assert theirs.encode(text) == ours.tokenize(text) and ours.detokenize(theirs.encode(text)) == text
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == ours.eos


def test_self_speculation_of_transformers(tmp_path: Path) -> None:
    """Exits that share norm and output matrix with the model are those that `assistant_early_exit` drafts with."""
    tied = dict(untie_embeddings_and_output_weights=False)
    source = own_model("LlamaForCausalLM", EXITS["final_norm"], **tied)
    write_hf(source, tmp_path / "out")
    model = loaded(tmp_path / "out")
    prompt, greedy = tokens()[:1, :8], dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    alone = model.generate(prompt, **greedy)
    drafted = model.generate(prompt, assistant_early_exit=2, **greedy)
    assert alone.shape[1] == 20 and torch.equal(alone, drafted)
    model.config.num_hidden_layers = 2  # what the draft is computed by
    torch.testing.assert_close(hf_logits(model), source.expected["2"], rtol=1e-4, atol=1e-4)


def test_old_spellings_of_the_config(tmp_path: Path) -> None:
    """Releases before 5 write rope_theta and rope_scaling, and torch_dtype."""
    theirs = hf_model("llama3_rope")
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    path.write_text(json.dumps(config))
    expected = replace(HfSource(tmp_path / "theirs").config.model, rotary_base=500.0, rope_scaling_factor=4.0)
    source = HfSource(tmp_path / "theirs")
    assert source.config.model == expected and isinstance(expected, ModelConfig) and expected.use_rope_scaling
    ours = logits(model_of(source), tokens())["final"][..., :VOCAB]
    torch.testing.assert_close(ours, hf_logits(theirs), rtol=1e-4, atol=1e-4)
