"""A checkpoint written in one layout is read in any other: the same tensors, and the same next step (row R4)."""

from pathlib import Path

import pytest
import torch

from megatron.checkpoint import native
from megatron.checkpoint.find import recognise
from megatron.parallel.mesh import ONE_RANK
from megatron.testing.layouts import assemble, resume_and_step, save_after_steps, toy_config
from megatron.testing.ranks import RankError, Ranks

FLAGS = (
    "--swiglu --exit-layer-nums 1 3 --exit-layer-weight 0.25 0.5 --use-exit-norm --group-query-attention "
    "--num-query-groups 4"
)
L10 = {
    "one": {}, "tp2": {"tp": 2}, "tp4": {"tp": 4}, "pp2": {"pp": 2}, "pp4": {"pp": 4}, "dp2": {"dp": 2},
    "dp4": {"dp": 4},
    "tp2pp2": {"tp": 2, "pp": 2}, "tp2dp2": {"tp": 2, "dp": 2}, "pp2dp2": {"pp": 2, "dp": 2},
}  # fmt: skip
QUICK = [(a, b) for a in L10 for b in L10 if (a == "tp2pp2") != (b == "tp2pp2")] + [("one", "one")]


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory):
    """Layout -> a directory with its checkpoint after two steps; made when first asked for."""
    made: dict[str, Path] = {}

    def get(layout: str) -> Path:
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp(layout)
            config = toy_config(*FLAGS.split(), "--save", str(made[layout]))
            ranks.run(save_after_steps, config, 2, **L10[layout])
        return made[layout]

    return get


def check(ranks: Ranks, directory: Path, layout: str) -> None:
    config = toy_config(*FLAGS.split(), "--load", str(directory))
    answers = ranks.run(resume_and_step, config, **L10[layout])
    stored = native.read(recognise(directory).directory).tensors
    found = assemble(answers)
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(found[name], tensor), name
    alone = resume_and_step(ONE_RANK, config)
    for answer in answers:
        assert answer["iteration"] == 3
        assert answer["losses"] == pytest.approx(alone["losses"], rel=1e-6)


@pytest.mark.parametrize(("written", "read"), QUICK)
def test_any_layout_reads_what_another_wrote(ranks: Ranks, saved, written: str, read: str) -> None:
    check(ranks, saved(written), read)


@pytest.mark.slow
@pytest.mark.parametrize("read", L10)
@pytest.mark.parametrize("written", L10)
def test_all_pairs(ranks: Ranks, saved, written: str, read: str) -> None:
    check(ranks, saved(written), read)


@pytest.mark.parametrize("other", ["--untie-embeddings-and-output-weights", "--untie-exit-output-weights"])
def test_what_no_rank_has_a_place_for_is_refused(ranks: Ranks, tmp_path: Path, other: str) -> None:
    """Each rank has some of the model; what is left over by all of them belongs to another one."""
    exits = "--exit-layer-nums 1 3"
    ranks.run(save_after_steps, toy_config(*exits.split(), other, "--save", str(tmp_path)), 1)
    with pytest.raises(RankError, match=r"not in the model:\n .*output.weight"):
        ranks.run(resume_and_step, toy_config(*exits.split(), "--load", str(tmp_path)), pp=2)
