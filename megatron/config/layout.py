"""How the layers are spread over pipeline stages: equally, or as --pipeline-model-parallel-layout says. No torch.

A layout is Megatron-LM's text form: a `|` between stages, `t` for a layer, `E` for the embedding (first), `L` for the
final norm, head and loss (last); `*n` repeats a letter or a (group), commas are for the eye: `Ettt|t*4|(tt|)*2tL`.
"""

import re

from megatron.config.parallel import ParallelConfig
from megatron.errors import ConfigError

_REPEATED = re.compile(r"\(([^()]*)\)(?:\*(\d+))?|([EtL|])\*(\d+)")
_LONGEST = 100_000  # characters of a layout written out


def stage_depths(parallel: ParallelConfig, num_layers: int) -> tuple[int, ...]:
    """Layers of each pipeline stage. Raises ConfigError where they can't be spread so."""
    pp = parallel.pipeline_model_parallel_size
    if parallel.pipeline_model_parallel_layout is not None:
        depths = read_layout(parallel.pipeline_model_parallel_layout)
        problem = _misfit(depths, parallel, num_layers)
        if problem:
            raise ConfigError(f"--pipeline-model-parallel-layout {parallel.pipeline_model_parallel_layout}: {problem}")
        return depths
    depth = parallel.num_layers_per_virtual_pipeline_stage
    if depth:
        if num_layers % (depth * pp):
            raise ConfigError(
                f"--num-layers-per-virtual-pipeline-stage {depth} on {pp} pipeline ranks does not divide --num-layers "
                f"{num_layers}: each rank has as many stages of as many layers"
            )
        return (depth,) * (num_layers // depth)
    if num_layers % pp:
        raise ConfigError(
            f"--pipeline-model-parallel-size {pp} does not divide --num-layers {num_layers}: give stages of other "
            f"depths by --pipeline-model-parallel-layout"
        )
    return (num_layers // pp,) * pp


def read_layout(text: str) -> tuple[int, ...]:
    """Layers of each stage of a layout. Raises ConfigError for one that is not well-formed."""
    stages = _written_out(text).split("|")
    for number, stage in enumerate(stages):
        wanted = ("E" if number == 0 else "") + "t" * stage.count("t") + ("L" if number == len(stages) - 1 else "")
        if stage != wanted:
            raise ConfigError(
                f"--pipeline-model-parallel-layout {text}: stage {number} is {stage!r}, expected "
                f"{wanted!r}: the first stage begins with E, the last ends with L, layers are t"
            )
        if not stage:
            raise ConfigError(f"--pipeline-model-parallel-layout {text}: stage {number} is empty: give it a layer (t)")
    return tuple(stage.count("t") for stage in stages)


def write_layout(depths: tuple[int, ...]) -> str:
    """Inverse of `read_layout`."""
    stages = ["t" if depth == 1 else f"t*{depth}" if depth else "" for depth in depths]
    return f"E{'|'.join(stages)}L"


def _written_out(text: str) -> str:
    plain = re.sub(r"[,\s]", "", text)
    while found := _REPEATED.search(plain):
        part, times = (found[3], found[4]) if found[1] is None else (found[1], found[2] or 1)
        times = int(times)
        if len(plain) + times * len(part) > _LONGEST:
            raise ConfigError(f"--pipeline-model-parallel-layout {text}: it repeats too much")
        plain = plain[: found.start()] + part * times + plain[found.end() :]
    odd = re.search(r"[^EtL|]", plain)
    if odd:
        hint = ": multi-token prediction is not supported" if odd[0] == "m" else ""
        raise ConfigError(
            f"--pipeline-model-parallel-layout {text}: {odd[0]!r} is none of E, t, L, |, *number and ( ){hint}"
        )
    return plain


def _misfit(depths: tuple[int, ...], parallel: ParallelConfig, num_layers: int) -> str | None:
    pp = parallel.pipeline_model_parallel_size
    if len(depths) % pp:
        return f"{len(depths)} stages don't spread over --pipeline-model-parallel-size {pp}: have a multiple of it"
    if sum(depths) != num_layers:
        return f"it has {sum(depths)} layers, --num-layers {num_layers}"
    if parallel.num_layers_per_virtual_pipeline_stage:
        return "it says already what --num-layers-per-virtual-pipeline-stage says: leave that out"
    return None
