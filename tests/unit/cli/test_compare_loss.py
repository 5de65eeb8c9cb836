import json

import pytest

from megatron.cli.compare_loss import main


def write(path, losses, **extra):
    lines = [json.dumps({"iteration": i, "loss/final": loss} | extra) for i, loss in enumerate(losses, 1)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_equal_runs(tmp_path, capsys):
    a = write(tmp_path / "a", [3.0, 2.0], step_time_s=1.0)
    b = write(tmp_path / "b", [3.0, 2.0], step_time_s=9.0)
    assert main([a, b, "--assert-equal"]) == 0
    assert "2 common steps, 0 differences" in capsys.readouterr().out


def test_last_bit_counts(tmp_path, capsys):
    a, b = write(tmp_path / "a", [3.0, 2.0]), write(tmp_path / "b", [3.0, 2.0000000000000004])
    assert main([a, b]) == 0
    assert "iteration 2, loss/final" in capsys.readouterr().out
    assert main([a, b, "--assert-equal"]) == 1


def test_the_last_of_repeated_iterations_counts_and_lengths_matter(tmp_path):
    a = write(tmp_path / "a", [3.0, 2.0])
    again = tmp_path / "b"
    again.write_text('{"iteration": 2, "loss/final": 9.0}\n' + (tmp_path / "a").read_text())
    assert main([a, str(again), "--assert-equal"]) == 0
    assert main([a, write(tmp_path / "c", [3.0]), "--assert-equal"]) == 1
    assert main([write(tmp_path / "d", []), write(tmp_path / "e", []), "--assert-equal"]) != 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[1, 2]", "not a record"),
        (b'{"loss/final": 2.0}', "not a record with an iteration"),
        (b'{"iteration": "2", "loss/final": 2.0}', "not a record with an iteration"),
        (b'{"iteration": 2, "loss/final": "x"}', "loss/final is 'x', not a number"),
        (b'{"iteration": 2, "note": "\xff"}', "not JSON ('utf-8'"),
        (b"[" * 90_000, "not JSON"),
    ],
)
def test_bad_line_is_named(tmp_path, capsys, line, words):
    path = tmp_path / "a"
    path.write_bytes(b'{"iteration": 1, "loss/final": 3.0}\n' + line + b"\n")
    assert main([str(path), str(path)]) == 2
    assert f"error: {path}, line 2: {words}" in capsys.readouterr().err


def test_bad_file_is_named(tmp_path, capsys):
    (tmp_path / "a").write_text("{broken\n")
    assert main([str(tmp_path / "a"), str(tmp_path / "a")]) == 2
    assert "line 1" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), str(tmp_path / "a")]) == 2
