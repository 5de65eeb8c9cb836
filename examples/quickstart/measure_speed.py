"""Trains a few steps with each number of threads and number format that might be fastest here, and says which was.

    python measure_speed.py --output FILE --threads 2 1 --seconds 3 -- FLAGS OF pretrain_early_exit_gpt.py

FILE gets {"tokens_per_s", "threads", "bf16"} of the fastest. Nothing that was trained is kept.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import time
from itertools import islice
from pathlib import Path

import torch

# the package of this checkout, wherever the script is called from and whatever else is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.cli.pretrain import resolve_config
from megatron.errors import EELLMError
from megatron.files import atomic_write
from megatron.train import checkpoints
from megatron.train.build import build_trainer
from megatron.train.data import make_datasets, microbatches, step_batches
from megatron.train.step import train_step

WARM_UP_STEPS = 2
CLEARLY = 1.08  # bf16 rounds: it must gain this much, where fp32 is an option


def measure(flags: list[str], threads: int, seconds: float) -> float:
    """Tokens per second of the training step, by the median of as many steps as fit into `seconds`."""
    torch.set_num_threads(threads)
    trainer = build_trainer(resolve_config(flags)[0])
    checkpoints.start(trainer)
    stream = microbatches(trainer, make_datasets(trainer).train, 0)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) <= WARM_UP_STEPS or time.perf_counter() - started < seconds:
        batches = step_batches(trainer, stream)
        begin = time.perf_counter()
        train_step(trainer, batches)
        trainer.mesh.backend.synchronize()
        times.append(time.perf_counter() - begin)
    tokens = sum(batch.tokens.numel() for batch in batches)
    return tokens / statistics.median(islice(times, WARM_UP_STEPS, None))


def fastest(flags: list[str], threads: list[int], seconds: float) -> dict:
    """Try the thread counts, then bf16 with the best of them."""
    speeds = {count: measure(flags, count, seconds) for count in threads}
    best = max(speeds, key=speeds.__getitem__)
    rounded = measure([*flags, "--bf16"], best, seconds)
    use_bf16 = rounded > CLEARLY * speeds[best]
    return {"tokens_per_s": rounded if use_bf16 else speeds[best], "threads": best, "bf16": use_bf16}


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE")
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1], metavar="N")
    parser.add_argument("--seconds", type=float, default=3, help="for each try (default: 3)")
    parser.add_argument("flags", nargs="*", help="of pretrain_early_exit_gpt.py, after --")
    options = parser.parse_args()
    logging.getLogger("megatron").setLevel(logging.WARNING)
    try:
        result = fastest(options.flags, options.threads, options.seconds)
    except EELLMError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    with atomic_write(str(options.output)) as file:
        file.write(json.dumps(result).encode())
    number_format = "bf16" if result["bf16"] else "fp32"
    threads = f"{result['threads']} thread{'s' if result['threads'] != 1 else ''}"
    sys.stdout.write(f"{result['tokens_per_s']:,.0f} tokens/s with {threads} in {number_format}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
