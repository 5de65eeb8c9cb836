"""Fault points: nothing unless armed, and then exactly what and where was said."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron import faults

ROOT = Path(__file__).resolve().parents[2]


def test_unarmed_points_do_nothing() -> None:
    faults.point("a")
    stream = object()
    assert faults.watched(stream, "a") is stream


def test_points_are_counted_by_name_and_all_together() -> None:
    with faults.armed("a@2:raise @4:enospc b:erofs") as names:
        faults.point("a")
        with pytest.raises(faults.InjectedFault, match="a"):
            faults.point("a")
        faults.point("a")
        with pytest.raises(OSError, match="No space left"):
            faults.point("a")
        with pytest.raises(OSError) as caught:
            faults.point("b")
    assert caught.value.errno == errno.EROFS and names == ["a", "a", "a", "a", "b"]
    faults.point("b")


def test_writes_are_watched() -> None:
    class Stream:
        name = "x"

        def write(self, content: bytes) -> int:
            return len(content)

    with faults.armed("w@2:enospc"):
        stream = faults.watched(Stream(), "w")
        assert stream.write(b"abc") == 3 and stream.name == "x"
        with pytest.raises(OSError, match="No space left"):
            stream.write(b"abc")


@pytest.mark.parametrize(("action", "code"), [("die", -signal.SIGKILL), ("delay=0.01", 0)])
def test_the_environment_arms_a_process(action: str, code: int) -> None:
    environment = {**os.environ, "EE_LLM_FAULTS": f"here:{action}", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", "from megatron import faults; faults.point('here')"]
    assert subprocess.run(words, env=environment).returncode == code


@pytest.mark.parametrize("words", ["a", "a:explode", "a:stop", "a@x:die"])
def test_nonsense_is_refused(words: str) -> None:
    with pytest.raises((AssertionError, ValueError)), faults.armed(words):
        pass
