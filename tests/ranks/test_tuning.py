"""Exits tuned on a frozen backbone: gradients, what is loaded and saved, in one process and on several ranks."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import native
from megatron.checkpoint.find import recognise
from megatron.cli.convert_checkpoint import main as convert
from megatron.config.run import RunConfig
from megatron.errors import CheckpointError, ConfigError
from megatron.inference.build import load_model
from megatron.model.names import model_state
from megatron.parallel.mesh import ONE_RANK, Mesh
from megatron.testing.layouts import VOCAB, Whole, assemble, build, one_step, toy_config
from megatron.testing.ranks import Ranks
from megatron.testing.tiny import random_batch
from megatron.train import checkpoints
from megatron.train.build import build_trainer
from megatron.train.evaluate import evaluate
from megatron.train.step import train_step
from megatron.train.trainer import Trainer

EXITS = "--exit-layer-nums 1 3 --exit-layer-weight 0.3 0.7 --untie-exit-output-weights"
KINDS = {
    "norm": f"{EXITS} --use-exit-norm",
    "mlp": f"{EXITS} --use-exit-norm --use-exit-mlp --swiglu --ffn-hidden-size 48",
    "block": f"{EXITS} --use-exit-block --untie-embeddings-and-output-weights",
    "pre": f"{EXITS} --pre-exit --use-exit-norm --exit-layer-nums 1 4",
    "first_half": f"{EXITS} --exit-layer-nums 1 2 --use-exit-norm",
}
TUNE = "--tune-exit --weight-decay 0"


def tuned(kind: str, *more: str) -> RunConfig:
    return toy_config(*KINDS[kind].split(), *TUNE.split(), *more)


def of_exits(gradients: Whole) -> Whole:
    return {name: tensor for name, tensor in gradients.items() if name.startswith("exits.")}


def compare(found: Whole, expected: Whole) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_exits_learn_as_in_full_training(kind: str) -> None:
    """Their gradients don't depend on what the rest learns; the norm is theirs alone."""
    full = one_step(ONE_RANK, toy_config(*KINDS[kind].split()), torch.float64)
    ours = one_step(ONE_RANK, tuned(kind), torch.float64)
    compare(assemble([ours]), of_exits(assemble([full])))
    assert ours["losses"] == pytest.approx({k: v for k, v in full["losses"].items() if k != "final"}, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "layout", "more"),
    [
        ("norm", {"pp": 2, "tp": 2}, "--pipeline-model-parallel-size 2"),
        ("first_half", {"pp": 2, "dp": 2}, "--pipeline-model-parallel-size 4 --use-distributed-optimizer"),
        pytest.param("mlp", {"pp": 4}, "--pipeline-model-parallel-size 4", marks=pytest.mark.slow),
        pytest.param(
            "block", {"tp": 2, "dp": 2}, "--sequence-parallel --use-distributed-optimizer", marks=pytest.mark.slow
        ),
        pytest.param("pre", {"pp": 2}, "--pipeline-model-parallel-size 2", marks=pytest.mark.slow),
        pytest.param("first_half", {"pp": 3}, "--pipeline-model-parallel-size 4", marks=pytest.mark.slow),
    ],
)
def test_ranks_tune_as_one_process(ranks: Ranks, kind: str, layout: dict[str, int], more: str) -> None:
    """first_half on three of four stages: the last has nothing to do."""
    alone = one_step(ONE_RANK, tuned(kind), torch.float64)
    answers = ranks.run(one_step, tuned(kind, *more.split()), torch.float64, **layout)
    compare(assemble(answers), assemble([alone]))
    for answer in answers:
        assert answer["losses"] == pytest.approx(alone["losses"], rel=1e-10)
        assert answer["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-10)


def steps(trainer: Trainer, numbers: Iterable[int]) -> list[dict[str, float]]:
    batches = {step: [random_batch(1, 16, VOCAB, seed=10 * step + m) for m in range(2)] for step in numbers}
    return [train_step(trainer, batch).losses for batch in batches.values()]


def weights(trainer: Trainer) -> Whole:
    return {name: part.view.clone() for name, part in model_state(trainer.model, trainer.vocab_size).items()}


def test_the_backbone_stays_as_it_is_to_the_bit() -> None:
    """Its dropout is off, whatever the flags say: the same losses as without."""
    dropped = ["--hidden-dropout", "0.3", "--attention-dropout", "0.3"]
    trainers = [build(ONE_RANK, tuned("norm", *more), torch.float32) for more in ([], dropped)]
    before = weights(trainers[0])
    losses = [steps(trainer, range(3)) for trainer in trainers]
    assert losses[0] == losses[1]
    after = weights(trainers[0])
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name for name in after if name.startswith("exits.")} == changed
    assert all(p.grad is None for n, p in trainers[0].model.named_parameters() if not n.startswith("exits."))


def test_every_head_is_evaluated_where_all_is_loaded_else_the_exits() -> None:
    whole = build(ONE_RANK, tuned("first_half"), torch.float64)
    part = build(ONE_RANK, tuned("first_half", "--pipeline-model-parallel-size", "2"), torch.float64)
    batch = random_batch(2, 16, VOCAB, seed=1)
    everything, exits = evaluate(whole, [batch]), evaluate(part, [batch])
    assert list(everything) == ["1", "2", "final"]
    assert list(exits) == ["1", "2"]
    assert exits["2"].loss == pytest.approx(everything["2"].loss, rel=1e-12)
    assert everything["final"].agreement == 1.0
    assert exits["1"].agreement != exits["1"].agreement, "NaN: nobody knows what the full model says"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint of a whole model with tied exits behind layers 1, 2 and 3, that has learnt a little."""
    flags = ("--exit-layer-nums", "1", "2", "3", "--use-exit-norm", "--save", str(tmp_path / "base"))
    trainer = build(ONE_RANK, toy_config(*flags), torch.float32)
    steps(trainer, range(2))
    checkpoints.save(trainer)
    return tmp_path / "base"


def start(config: RunConfig) -> Trainer:
    trainer = build_trainer(config)
    checkpoints.start(trainer)
    return trainer


def on_first_stage(base: Path, *more: str) -> RunConfig:
    """Of four stages the first two are loaded, and of the three exits there the second is tuned, with a copied head."""
    flags = "--exit-layer-nums 2 --use-exit-norm --tune-exit --finetune --pipeline-model-parallel-size 2"
    return toy_config(*flags.split(), "--load", str(base), *more)


def test_a_tied_exit_gets_a_copy_and_the_rest_stays_behind(base: Path) -> None:
    trainer, stored = start(on_first_stage(base)), native.read(recognise(base).directory).tensors
    assert len(trainer.model.layers) == 2
    mine = weights(trainer)
    assert torch.equal(mine["exits.2.output.weight"], stored["model/embedding.word.weight"])
    assert torch.equal(mine["exits.2.norm.weight"], stored["model/exits.2.norm.weight"])
    assert torch.equal(mine["layers.1.mlp.up.weight"], stored["model/layers.1.mlp.up.weight"])
    steps(trainer, range(2))
    after = weights(trainer)
    assert torch.equal(after["embedding.word.weight"], stored["model/embedding.word.weight"])
    assert not torch.equal(after["exits.2.output.weight"], mine["exits.2.output.weight"])


def test_exits_alone_are_saved_and_go_on_with_their_backbone(base: Path, tmp_path: Path) -> None:
    save = ["--save", str(tmp_path / "exits"), "--save-exits-only"]
    trainer = start(on_first_stage(base, *save))
    undisturbed = steps(trainer, range(4))
    trainer = start(on_first_stage(base, *save))
    steps(trainer, range(2))
    directory = checkpoints.save(trainer)
    names = native.tensor_index(directory)
    assert names
    assert all("exits.2." in name for name in names)
    assert native.read_facts(directory)["holds"] == "exits"

    again = replace(on_first_stage(base, *save).checkpoint, load=str(tmp_path / "exits"), finetune=False)
    with pytest.raises(CheckpointError, match="--backbone DIR"):
        start(replace(on_first_stage(base), checkpoint=again))
    trainer = start(replace(on_first_stage(base), checkpoint=replace(again, backbone=str(base))))
    assert trainer.progress.iteration == 2
    assert steps(trainer, range(2, 4)) == undisturbed[2:]


def test_what_was_loaded_can_be_saved_and_goes_on(base: Path, tmp_path: Path) -> None:
    save = ["--save", str(tmp_path / "part")]
    trainer = start(on_first_stage(base, *save))
    undisturbed = steps(trainer, range(4))
    trainer = start(on_first_stage(base, *save))
    steps(trainer, range(2))
    directory = checkpoints.save(trainer)
    assert native.read_facts(directory)["holds"] == 2
    again = replace(on_first_stage(base, *save).checkpoint, load=str(tmp_path / "part"), finetune=False)
    trainer = start(replace(on_first_stage(base), checkpoint=again))
    assert steps(trainer, range(2, 4)) == undisturbed[2:]


def loaded_parts(mesh: Mesh, config: RunConfig) -> dict[str, Any]:
    trainer = build_trainer(config, mesh=mesh)
    checkpoints.start(trainer)
    parts = checkpoints.state_tensors(trainer, optimizer=False)
    return {"gradients": {name: (part.view.clone(), part.shape, part.offset) for name, part in parts.items()}}


def test_ranks_load_their_parts_of_the_first_stages(ranks: Ranks, base: Path) -> None:
    flags = on_first_stage(base)
    alone = assemble([loaded_parts(ONE_RANK, flags)])
    parallel = replace(flags.parallel, tensor_model_parallel_size=2)
    compare(assemble(ranks.run(loaded_parts, replace(flags, parallel=parallel), tp=2, dp=2)), alone)


def test_exits_beyond_the_loaded_stages_are_refused_where_none_is_left() -> None:
    flags = tuned("norm", "--exit-layer-nums", "3", "4", "--pipeline-model-parallel-size", "2")
    with pytest.raises(ConfigError, match="no exit lies in the first 1 pipeline stages, which end at layer 2"):
        build_trainer(flags)


@pytest.mark.parametrize("alone", [True, False])
def test_tuned_exits_are_merged_into_the_whole_model(base: Path, tmp_path: Path, alone: bool) -> None:
    """Of three tied exits the tuned one is replaced; the others get copies of what they used, and compute the same."""
    tuned = ["--save", str(tmp_path / "tuned"), *(["--save-exits-only"] if alone else [])]
    trainer = start(on_first_stage(base, *tuned))
    steps(trainer, range(2))
    checkpoints.save(trainer)
    with pytest.raises(CheckpointError, match="exits alone" if alone else "the first 2 layers alone"):
        load_model(tmp_path / "tuned", device="cpu")

    words = f"--load-dir {base} --save-dir {tmp_path / 'merged'} --merge-exits {tmp_path / 'tuned'}"
    assert convert(words.split()) == 0
    before, after = (native.read(recognise(root).directory).tensors for root in (base, tmp_path / "merged"))
    mine = weights(trainer)
    for name, tensor in after.items():
        part = name.removeprefix("model/")
        if part.startswith("exits.2."):
            assert torch.equal(tensor, mine[part]), name
        elif part.startswith("exits.") and ".output.weight" in part:
            assert torch.equal(tensor, before[f"model/embedding.word.weight{part.partition('.output.weight')[2]}"]), (
                name
            )
        else:
            assert torch.equal(tensor, before[name]), name
    model, _, config = load_model(tmp_path / "merged", device="cpu")
    assert model.head_labels() == ("1", "2", "3", "final")
    assert config.exits.untie_exit_output_weights


def test_exits_of_another_model_are_not_merged(base: Path, tmp_path: Path, capsys) -> None:
    other = build(ONE_RANK, tuned("norm", "--hidden-size", "64", "--save", str(tmp_path / "other")), torch.float32)
    checkpoints.save(other)
    words = f"--load-dir {base} --save-dir {tmp_path / 'merged'} --merge-exits {tmp_path / 'other'}"
    assert convert(words.split()) == 2
    assert "tuned on another model than --load-dir: hidden_size 32 and 64" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
