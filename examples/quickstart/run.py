"""The quickstart, step by step; `bash examples/quickstart.sh` prepares .venv and calls this.

A step that is done is noted in RUN_DIR/steps.json and passed over the next time; each step writes its results whole
or not at all, and training goes on from its last checkpoint. The commands are kept in RUN_DIR/commands.sh.
"""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

# the package of this checkout, whatever else is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sizes
from progress import TrainingProgress, clock, say

from megatron.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("prose", "code")
MIX = (0.5, 0.5)  # of the tokens trained on; of the text, prose is but a fifth
MOST_TIME = 1.6  # training stops, with a checkpoint, after this many times the minutes asked for
PATIENCE = 120  # seconds for a step to save its work when it is asked to stop


class QuickstartError(Exception):
    """What the user should know about a failure, in one message."""


@dataclass(frozen=True)
class Wish:
    """What the environment variables ask for."""

    minutes: float | None
    quick: bool
    directory: Path

    @staticmethod
    def read(env: Mapping[str, str]) -> "Wish":
        """Raises QuickstartError for MINUTES that is no positive number, or given beside QUICK."""
        quick = env.get("QUICK", "") not in ("", "0")
        text = env.get("MINUTES", "")
        try:
            minutes = float(text) if text else None
        except ValueError:
            minutes = math.nan
        if minutes is not None and not 0 < minutes < math.inf:
            raise QuickstartError(f"MINUTES={text} is no positive number of minutes")
        if quick and minutes is not None:
            raise QuickstartError("QUICK=1 and MINUTES contradict each other: give one of them")
        name = "quick" if quick else "" if minutes is None else f"{minutes:g}-minutes"
        return Wish(minutes, quick, Path(env.get("RUN_DIR") or ROOT / "quickstart-run" / name))


@dataclass(frozen=True)
class Step:
    """`seconds`: what it takes on two cores. `again`: done anew each time. The action returns False if unfinished."""

    name: str
    title: str
    seconds: float
    action: Callable[[], bool | None]
    again: bool = False


class Quickstart:
    """One run directory, what it remembers, and the steps that fill it."""

    def __init__(self, wish: Wish) -> None:
        self.directory, self.quick = wish.directory, wish.quick
        self.directory.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, float] = self._read("steps.json") or {}
        self.plan = self._make_plan(wish)
        self.checkpoints, self.metrics = self.directory / "checkpoints", self.directory / "metrics.jsonl"

    def run(self) -> None:
        """Do what is left."""
        steps = self._steps()
        left = sum(step.seconds for step in steps if step.again or step.name not in self.done)
        say(f"EE-LLM quickstart: about {clock(left)} minutes; everything goes to {self.directory}")
        for number, step in enumerate(steps, start=1):
            if step.name in self.done and not step.again:
                say(f"[{number}/{len(steps)}] {step.title}: done before")
                continue
            say(f"\n[{number}/{len(steps)}] {step.title}: about {clock(step.seconds)}, {clock(left)} left in all")
            started = time.monotonic()
            finished = step.action()
            left -= step.seconds
            if finished is not False:
                self.done[step.name] = round(time.monotonic() - started, 1)
                self._write("steps.json", self.done)
        self._say_what_next()

    def _steps(self) -> list[Step]:
        quick, train = self.quick, self.plan.minutes * 60
        return [
            Step("text", "Collecting text from Python's standard library", 4 if quick else 10, self._collect),
            Step("tokenizer", "Training a byte-level BPE tokenizer", 3 if quick else 8, self._train_tokenizer),
            Step("tokens", "Turning the text into tokens", 8 if quick else 20, self._preprocess),
            Step("speed", "Measuring how fast this machine trains", 10 if quick else 18, self._measure_speed),
            Step("train", "Training a model with early exits", train + 8, self._train),
            Step("evaluate", "Scoring each exit on files it never saw", 6 if quick else 20, self._evaluate, True),
            Step("plot", "Drawing the losses", 3, self._plot, True),
            Step("compare", "Generating with and without early exits", 12 if quick else 120, self._compare, True),
        ]

    # the steps

    def _collect(self) -> None:
        wanted = ("--output", self.directory / "text", "--megabytes", f"{self.plan.megabytes:g}")
        output = self._call("collect", "examples/quickstart/collect_text.py", *wanted)
        for line in output.splitlines():
            say(f"   {line}")

    def _train_tokenizer(self) -> None:
        text = [self._text("train", kind) for kind in KINDS]
        wanted = ("--vocab-size", self.plan.vocab_size, "--output", self.directory / "tokenizer")
        output = self._call("tokenizer", "tools/train_tokenizer.py", "--input", *text, *wanted)
        say(f"   {output.splitlines()[-1].split(';')[0]}")

    def _preprocess(self) -> None:
        counts = {}
        for part in ("train", "heldout"):
            for kind in KINDS:
                prefix = self.directory / "tokens" / f"{part}_{kind}"
                output = self._call(
                    "preprocess", "tools/preprocess_data.py", "--input", self._text(part, kind),
                    *self._tokenizer_flags(), "--append-eod", "--output-prefix", prefix,
                )  # fmt: skip
                counts[f"{part}_{kind}"] = int(re.search(r"([\d,]+) tokens", output)[1].replace(",", ""))
        self._write("tokens.json", counts)
        train, held_out = (sum(n for name, n in counts.items() if name.startswith(p)) for p in ("train", "heldout"))
        say(f"   {train / 1e6:.2f}M tokens to train on, {held_out / 1e6:.2f}M held out")

    def _measure_speed(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found = self.directory / "speed.json"
        seconds = "1.5" if self.quick else "4"
        tries = ("--threads", *sorted({cores, max(1, cores // 2)}, reverse=True), "--seconds", seconds)
        flags = replace(self.plan, iterations=1000).training_flags() + self._data_flags()
        output = self._call(
            "speed", "examples/quickstart/measure_speed.py", "--output", found, *tries, "--", *flags
        )  # fmt: skip
        speed = self._read("speed.json")
        plan = replace(self.plan, threads=speed["threads"], bf16=speed["bf16"])
        corpus = sum(n for name, n in self._read("tokens.json").items() if name.startswith("train"))
        self.plan = replace(plan, iterations=sizes.fit(plan, speed["tokens_per_s"], corpus))
        self._write("plan.json", asdict(self.plan))
        tokens = self.plan.iterations * self.plan.tokens_per_iteration
        say(f"   {output.splitlines()[-1]}: {self.plan.iterations:,} steps, {tokens / 1e6:.1f}M tokens")

    def _train(self) -> bool:
        plan = self.plan
        interval = plan.iterations // plan.evaluations
        flags = [
            *plan.training_flags(), *self._data_flags(), "--valid-data-path", *self._blend("heldout"),
            "--eval-interval", interval, "--eval-iters", plan.eval_batches,
            "--save", self.checkpoints, "--load", self.checkpoints, "--save-interval", interval,
            "--metrics-file", self.metrics, "--log-interval", max(1, interval // 4),
            "--exit-duration-in-mins", f"{MOST_TIME * plan.minutes:g}",
        ]  # fmt: skip
        progress = TrainingProgress(self.metrics, plan.iterations, plan.tokens_per_iteration)
        output = self._call("train", "pretrain_early_exit_gpt.py", *flags, watch=progress.update)
        progress.close()
        if "run ended: finished" in output:
            return True
        if "is over" not in output:
            raise QuickstartError(f"training was stopped from outside. {AGAIN}")
        say(
            f"   This machine became slower than it was when it was measured: {progress.iteration:,} of "
            f"{plan.iterations:,} steps are done. What follows is of that state. {AGAIN}"
        )
        return False

    def _evaluate(self) -> None:
        record = self.directory / "evaluation.jsonl"
        record.unlink(missing_ok=True)
        flags = ("--skip-train", "--eval-iters", 4 * self.plan.eval_batches, "--metrics-file", record)
        self._call("evaluate", "pretrain_early_exit_gpt.py", "--load", self.checkpoints, *flags)
        scores = json.loads(record.read_text().splitlines()[-1])
        say("   held-out text     loss   perplexity   next token right   same as full model")
        for name in (*(f"exit_{n}" for n in self.plan.exit_layers), "final"):
            title = "full model" if name == "final" else f"after layer {name[5:]}"
            agreement = f"{scores[f'eval/agreement/{name}']:.1%}" if name != "final" else ""
            say(
                f"   {title:<14} {scores[f'eval/loss/{name}']:7.3f} {scores[f'eval/ppl/{name}']:12.1f} "
                f"{scores[f'eval/accuracy/{name}']:18.1%} {agreement:>20}"
            )

    def _plot(self) -> None:
        picture = self.directory / "losses.png"
        self._call(
            "plot", "tools/plot_metrics.py", "--metrics-file", self.metrics, "--output", picture,
            "--title", f"Loss of each exit ({self.plan.num_layers} layers)",
        )  # fmt: skip
        say(f"   {picture}")

    def _compare(self) -> None:
        text = [self._text("heldout", kind) for kind in KINDS]
        wanted = ("--prompts", self.plan.prompts, "--repeats", 1 if self.quick else 2)
        self._call(
            "compare", "examples/quickstart/compare_exits.py", "--load", self.checkpoints, "--text", *text,
            "--output", self.directory, *wanted, shown=True,
        )  # fmt: skip

    def _say_what_next(self) -> None:
        here = self.directory
        best = (self._read("results.json") or {}).get("best") or {"threshold": 0.8}
        say(
            f"Everything lies in {here}:\n"
            "  losses.png               the loss of each exit over training\n"
            "  table.txt, samples.txt   what was shown above\n"
            "  checkpoints/             the model, with its tokenizer and its settings\n"
            "  metrics.jsonl            one line for each step of training\n"
            "  commands.sh              every command that was run, to change and run again\n"
            "  text/, tokens/, logs/    what it was trained on, and what the commands said\n"
            "\nWhat to try next:\n"
            "  generate, and see which exit gave which token:\n"
            f"    .venv/bin/python tools/generate_text.py --load {shlex.quote(str(self.checkpoints))} "
            '--prompt "Return a list of" --temperature 0.8 \\\n'
            f"        --use-early-exit --early-exit-thres {best['threshold']:g} --show-exits\n"
            "  train for longer (from 20 minutes on a larger model):\n"
            "    MINUTES=60 bash examples/quickstart.sh\n"
            "  train on your own text: JSON lines of {\"text\": ...} in place of text/ in commands.sh\n"
            "  all flags: .venv/bin/python pretrain_early_exit_gpt.py --help"
        )  # fmt: skip

    # flags that several steps share

    def _text(self, part: str, kind: str) -> Path:
        return self.directory / "text" / f"{part}_{kind}.jsonl"

    def _blend(self, part: str) -> list[str]:
        prefixes = [str(self.directory / "tokens" / f"{part}_{kind}_text_document") for kind in KINDS]
        return [word for share, prefix in zip(MIX, prefixes, strict=True) for word in (f"{share:g}", prefix)]

    def _tokenizer_flags(self) -> list[str]:
        return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(self.directory / "tokenizer")]

    def _data_flags(self) -> list[str]:
        return [
            *self._tokenizer_flags(), "--train-data-path", *self._blend("train"),
            "--data-cache-path", str(self.directory / "tokens" / "cache"), "--num-workers", "0",
        ]  # fmt: skip

    # running commands

    def _call(
        self, name: str, script: str, *words: object, watch: Callable[[], None] | None = None, shown: bool = False
    ) -> str:
        """Run a script of this repository to its end; returns what it wrote, which logs/NAME.log keeps.

        shown: its output goes to the terminal instead. watch: called while it runs, shows its progress in its place.
        Raises QuickstartError if it fails.
        """
        argv = [sys.executable, str(ROOT / script), *map(str, words)]
        self._note(argv)
        log = self.directory / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        bar = shown or (sys.stderr.isatty() and watch is None)  # the script draws one on standard error itself
        with open(log, "w", encoding="utf-8") as out:
            child = subprocess.Popen(
                argv,
                cwd=ROOT,
                env=self._environment(),
                stdout=None if shown else out,
                stderr=None if bar else subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this program, which then asks the child, once
            )
            _wait(child, watch)
        output = log.read_text(encoding="utf-8").strip()
        if child.returncode != 0:
            why = _why(child.returncode, "" if bar else output)
            raise QuickstartError(f"{script}: {why} (its output: {log}). {AGAIN}")
        return output

    def _environment(self) -> dict[str, str]:
        env = dict(os.environ)
        if self.plan.threads:
            env.setdefault("OMP_NUM_THREADS", str(self.plan.threads))
        # How long a thread that waits spins before it sleeps, some 0.1 ms: sleeping at once costs a third of the speed,
        # and the default makes steps several times slower where the cores have other work.
        env.setdefault("GOMP_SPINCOUNT", "10000")
        return env

    def _note(self, argv: list[str]) -> None:
        """Keep the command in commands.sh, once."""
        path = self.directory / "commands.sh"
        content = path.read_text() if path.exists() else f"cd {shlex.quote(str(ROOT))}\n"
        line = shlex.join(argv)
        if line not in content.splitlines():
            with atomic_write(str(path)) as file:
                file.write(f"{content}\n{line}\n".encode())

    # what the directory remembers

    def _make_plan(self, wish: Wish) -> sizes.Plan:
        """The directory's plan, or a new one. QuickstartError where the directory is of another wish."""
        saved = self._read("plan.json")
        if saved is None:
            import torch

            plan = sizes.choose(wish.minutes, wish.quick, torch.cuda.is_available())
            self._write("plan.json", asdict(plan))
            return plan
        try:
            plan = sizes.Plan(**saved)
        except TypeError as error:
            raise QuickstartError(f"{self.directory} is of another version of EE-LLM: remove it, or name another "
                                  "RUN_DIR") from error  # fmt: skip
        asked = sizes.choose(wish.minutes, wish.quick, gpu=False).minutes
        if plan.minutes != asked:
            raise QuickstartError(
                f"{self.directory} holds a run of {plan.minutes:g} minutes of training, not {asked:g}: name another "
                "RUN_DIR, or remove this one"
            )
        return plan

    def _read(self, name: str) -> dict | None:
        path = self.directory / name
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise QuickstartError(f"{path} cannot be read ({error}): remove {self.directory} to start anew") from error

    def _write(self, name: str, content: dict) -> None:
        with atomic_write(str(self.directory / name)) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")


AGAIN = "Run the same command again to go on."


def _wait(child: subprocess.Popen, watch: Callable[[], None] | None) -> None:
    """Wait for the child's end, looking twice a second; stopped from outside, let it save its work first."""
    try:
        while True:
            try:
                child.wait(0.5)
                break
            except subprocess.TimeoutExpired:
                if watch is not None:
                    watch()
        if watch is not None:
            watch()
    except KeyboardInterrupt:
        child.terminate()
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
        raise


def _why(code: int, output: str) -> str:
    """What ended a child: the signal, or its last words."""
    if code < 0:
        memory = "; often the system ended it for want of memory" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{memory}"
    return output.splitlines()[-1].removeprefix("error: ") if output else f"exit code {code}"


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the quickstart as the environment variables say; returns the exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        Quickstart(Wish.read(os.environ)).run()
    except QuickstartError as error:
        sys.stderr.write(f"\nerror: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"\nerror: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"\nStopped. {AGAIN}\n")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
