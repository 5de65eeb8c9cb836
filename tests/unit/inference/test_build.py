from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import native
from megatron.checkpoint.state import MODEL, RunState
from megatron.config.data import TokenizerConfig
from megatron.config.model import ExitConfig
from megatron.config.run import RunConfig
from megatron.config.stored import to_dict
from megatron.errors import CheckpointError, ConfigError
from megatron.inference.build import load_model
from megatron.inference.engine import Engine
from megatron.inference.policy import ConfidencePolicy
from megatron.inference.request import SamplingParams
from megatron.model.gpt import GPT
from megatron.model.names import model_state
from megatron.testing.tiny import build_gpt, model_config
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer
from megatron.tokenizer.null import NullTokenizer
from megatron.tokenizer.training import tokenizer_files, train_byte_level_bpe

EXITS = ExitConfig(exit_layer_nums=(1, 3), exit_norm="own")
LLAMA = model_config("llama", seq_length=32, max_position_embeddings=32)
NULL = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=59)


def save(root: Path, words: TokenizerConfig, tokenizer: Tokenizer, iteration: int = 5) -> GPT:
    """A checkpoint as training writes it, of a model whose padding differs from the loader's."""
    model = build_gpt(LLAMA, EXITS, tokenizer.vocab_size, tokenizer.vocab_size + 4, seed=iteration).eval()
    config = replace(RunConfig(), model=LLAMA, exits=EXITS, tokenizer=words)
    tensors = {MODEL + name: part.view for name, part in model_state(model, tokenizer.vocab_size).items()}
    tensors["optimizer/exp_avg/final_norm.weight"] = torch.zeros(32)
    facts = {"config": to_dict(config), "vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.fingerprint}
    native.save(root, iteration, RunState(tensors, facts), tokenizer.files())
    return model


def test_a_native_checkpoint_alone_is_enough(tmp_path: Path) -> None:
    files = tmp_path / "words"
    files.mkdir()
    trained = train_byte_level_bpe(["the cat sat on the mat and the dog sat on the log"] * 50, 280)
    for name, content in tokenizer_files(trained, "<|endoftext|>").items():
        (files / name).write_text(content)
    words = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(files))
    tokenizer = build_tokenizer(words.tokenizer_type, words.tokenizer_model)
    original = save(tmp_path / "run", words, tokenizer)
    fingerprint = tokenizer.fingerprint
    for file in files.iterdir():
        file.unlink()  # the flags' own files may be gone

    model, loaded, config = load_model(tmp_path / "run", device="cpu")
    assert loaded.fingerprint == fingerprint
    assert config.exits == EXITS
    assert not model.training
    prompt, params = loaded.tokenize("the cat"), SamplingParams(8)
    policy = ConfidencePolicy(0.05)
    ours = Engine(model, loaded).generate(prompt, params, policy)
    theirs = Engine(original, tokenizer).generate(prompt, params, policy)
    assert [t[:4] for t in ours.tokens] == [t[:4] for t in theirs.tokens]


def test_iteration_and_dtype(tmp_path: Path) -> None:
    for iteration in (5, 6):
        original = save(tmp_path, NULL, NullTokenizer(59), iteration)
    model, _, config = load_model(tmp_path, device="cpu", dtype="bfloat16")
    assert config.precision.params_dtype == "bfloat16"
    assert model.final_norm.weight.dtype == torch.bfloat16
    assert torch.equal(model.output.weight[:60], original.output.weight[:60].bfloat16())
    older, _, _ = load_model(tmp_path, 5, device="cpu")
    assert not torch.equal(older.output.weight[:60], original.output.weight[:60])
    assert not torch.equal(older.output.weight[:60].bfloat16(), model.output.weight[:60])


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    save(tmp_path, NULL, NullTokenizer(59))
    with pytest.raises(CheckpointError):
        load_model(tmp_path, device="cpu", tokenizer=replace(NULL, vocab_size=58))


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_model(tmp_path / "nowhere", device="cpu")


def test_megatron_checkpoints_need_the_tokenizers_flags(tmp_path: Path) -> None:
    rank = tmp_path / "iter_0000003" / "mp_rank_00"
    rank.mkdir(parents=True)
    (rank / "model_optim_rng.pt").write_bytes(b"never looked at")
    with pytest.raises(ConfigError, match="--tokenizer-type"):
        load_model(tmp_path, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        load_model(tmp_path, device="cuda")
