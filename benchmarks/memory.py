"""What exits cost each pipeline stage in memory, and what a sharded optimizer saves: peaks of real runs on CPUs.

Exits stand at the starts of the second and third of four stages (EE-LLM's own examples), their heads run just before
the backward pass. 1F1B's first stage holds the most microbatches: no stage with exits should need more than it does
without. The exits' own parameters, gradients and moments are counted and left aside. With GPipe for contrast.
"""

from report import Figure, arguments, finish

from megatron.testing.rank_memory import RankMemory, measure_in_fresh_processes


def words(sizes: dict[str, int], batch: int, more: str = "") -> list[str]:
    """The command line of a run without dropout, of so many sequences a step."""
    shape = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    common = (
        f"--attention-dropout 0 --hidden-dropout 0 --global-batch-size {batch} --train-iters 10 --lr 1e-3 "
        f"--tokenizer-type NullTokenizer --data-path none --distributed-backend gloo {more}"
    )
    return [*shape, *common.split()]


def pipeline(quick: bool, schedule: str, exits: bool) -> list[RankMemory]:
    """Each stage's memory: activations of a microbatch are many times what a stage keeps between steps."""
    layers, stages, micro_batch = (4, 2, 2) if quick else (8, 4, 8)
    sizes = {"num-layers": layers, "hidden-size": 256, "num-attention-heads": 8, "seq-length": 512,
             "vocab-size": 8191, "micro-batch-size": micro_batch}  # fmt: skip
    more = f"--pipeline-model-parallel-size {stages} --pipeline-schedule {schedule} "
    if exits:
        starts = [layers * stage // stages + 1 for stage in range(1, min(stages, 3))]
        more += (
            f"--exit-layer-nums {' '.join(map(str, starts))} --exit-layer-weight {' '.join(['0.5'] * len(starts))} "
            "--pre-exit --use-exit-norm --untie-exit-output-weights"
        )
    return measure_in_fresh_processes(words(sizes, 6 * micro_batch, more), stages)


def pipeline_figures(quick: bool, schedule: str, goal: float | None) -> list[Figure]:
    """Peaks of all stages with exits and without."""
    plain, exits = (pipeline(quick, schedule, wanted) for wanted in (False, True))
    figures, aside = [], []
    for stage, (without, having) in enumerate(zip(plain, exits, strict=True)):
        aside.append(having.peak - (having.kept - without.kept))
        name = f"{schedule}: peak of stage {stage}"
        figures += [
            Figure(f"{name} without exits", without.peak / 1e6, "MB"),
            Figure(f"{name} with exits, own state aside", aside[-1] / 1e6, "MB"),
        ]
    relative = max(aside) / plain[0].peak
    name = f"{schedule}: largest peak of a stage with exits, own state aside / stage 0 without"
    return [*figures, Figure(name, relative, "x", goal, at_least=False)]


def sharding_figures(quick: bool) -> list[Figure]:
    """A model that is mostly state, on two data-parallel ranks."""
    sizes = {"num-layers": 4, "hidden-size": 256 if quick else 1024, "num-attention-heads": 8, "seq-length": 128,
             "vocab-size": 8191, "micro-batch-size": 1}  # fmt: skip
    plain, sharded = (
        measure_in_fresh_processes(words(sizes, 2, more), 2) for more in ("", "--use-distributed-optimizer")
    )
    share = max(rank.state for rank in sharded) / (plain[0].state / 2)
    saved = plain[0].peak - max(rank.peak for rank in sharded)
    return [
        Figure("dp=2: optimizer state of a rank / half of the whole", share, "x", 1.05, at_least=False),
        Figure("dp=2: peak without --use-distributed-optimizer", plain[0].peak / 1e6, "MB"),
        Figure("dp=2: peak saved by --use-distributed-optimizer", saved / 1e6, "MB"),
        Figure("dp=2: peak saved / half of the state", saved / (plain[0].state / 2), "x"),
    ]


def main() -> int:
    """Command line; returns the exit code."""
    options = arguments(__doc__)
    figures = [
        *pipeline_figures(options.quick, "1f1b", 1.02),
        *pipeline_figures(options.quick, "gpipe", None),
        *sharding_figures(options.quick),
    ]
    return finish("memory", figures, options)


if __name__ == "__main__":
    raise SystemExit(main())
