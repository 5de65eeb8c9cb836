"""Numbers in words."""

from megatron.planning import report
from megatron.planning.units import counted, memory, percent, seconds, unit_of


def test_memory_is_in_the_unit_that_shows_it() -> None:
    assert memory(75.2e9) == "75.20 GB" and memory(4.26e6) == "4.3 MB"
    assert memory(4.26e6, "GB") == "0.00 GB"
    assert unit_of([1e6, 2e9]) == "GB" and unit_of([1e6, 999e6]) == "MB"


def test_nothing_has_no_sign() -> None:
    assert [percent(share) for share in (-1e-9, -0.0, 0.0004, 0.034)] == ["0.0%", "0.0%", "0.0%", "3.4%"]


def test_one_has_no_plural() -> None:
    assert counted(1, "microbatch") == "1 microbatch" and counted(0, "microbatch") == "0 microbatches"
    assert counted(2, "layer") == "2 layers"


def test_times_and_tables() -> None:
    assert seconds(72.754) == "72.75 s" and seconds(0.0125) == "12.5 ms"
    assert report.table([("a", "b"), ("10", "c")]) == " a  b\n10  c\n"
