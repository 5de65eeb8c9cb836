"""How commands end: exit codes, messages, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.cli.guard import run_guarded
from megatron.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[3]


def test_errors_are_one_message_and_a_code(capsys: pytest.CaptureFixture) -> None:
    def body() -> None:
        raise CheckpointError("it is gone")

    assert run_guarded(body) == 4
    assert capsys.readouterr().err == "error: it is gone\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_clean_up_and_end(number: int, code: int, capsys: pytest.CaptureFixture) -> None:
    cleaned = []

    def body() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    assert run_guarded(body, "stopped") == code
    assert cleaned == [True] and capsys.readouterr().err == "stopped\n"
    assert signal.getsignal(signal.SIGTERM) is before


def python(code: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-c", f"import sys\nfrom megatron.cli.guard import run_guarded\n{code}"]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_reader_that_leaves_is_no_error() -> None:
    child = python("sys.exit(run_guarded(lambda: [print('x' * 99, flush=True) for _ in range(99999)]))")
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait(30) == 141


def test_letters_that_the_terminal_lacks() -> None:
    child = python("sys.exit(run_guarded(lambda: print('caf\\u00e9')))")
    assert child.communicate(timeout=30) == ("caf\\xe9\n", "")
    assert child.returncode == 0


def test_sigterm_leaves_no_worker_and_no_file(tmp_path: Path) -> None:
    """preprocess_data with worker processes, ended while they work."""
    (tmp_path / "ids.jsonl").write_text(('{"text": "' + "7 " * 5000 + '"}\n') * 4000)
    words = [
        *("--input", "ids.jsonl", "--output-prefix", "out", "--tokenizer-type", "NullTokenizer"),
        *("--vocab-size", "9", "--workers", "2"),
    ]
    child = subprocess.Popen(
        [sys.executable, ROOT / "tools" / "preprocess_data.py", *words],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out*")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert child.poll() is None, "it ended before it could be stopped"
    child.terminate()
    child.communicate(timeout=60)
    assert child.returncode == 143
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.jsonl"]
    with pytest.raises(ProcessLookupError):  # no process of its session is left
        for _ in range(100):
            os.killpg(child.pid, 0)
            time.sleep(0.1)
