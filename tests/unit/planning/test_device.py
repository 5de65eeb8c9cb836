"""Devices: presets, figures that overrule them, measured profiles."""

import json
from pathlib import Path

import pytest

from megatron.errors import ConfigError
from megatron.planning.device import PRESETS, named_like, overruled, preset, read_profile


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    half, single = preset(name.lower(), "bfloat16"), preset(name, "float32")
    assert half.name == name and half.memory == single.memory > 1e9
    assert (half.flops_per_s > single.flops_per_s) == (half.kind == "cuda")
    assert half.link("tp", half.per_node) > half.link("dp", half.per_node + 1)


def test_unknown_names_are_refused_with_the_known() -> None:
    with pytest.raises(ConfigError, match="--device B9000 is not known: one of A100-40GB"):
        preset("B9000", "bfloat16")


def test_a_gpu_s_own_name_finds_its_preset() -> None:
    found = named_like("NVIDIA A100-SXM4-80GB", 79e9, "bfloat16")
    assert found.name == "A100-80GB" and found.memory == pytest.approx(79e9 * 0.94)
    assert named_like("NVIDIA A100-SXM4-40GB", 42e9, "bfloat16").name == "A100-40GB"
    assert named_like("NVIDIA H200", 150e9, "bfloat16").name == "H200"
    assert named_like("Some other card", 1e9, "bfloat16") is None


def test_single_figures_overrule() -> None:
    device = preset("H100", "bfloat16")
    assert overruled(device, {"memory": None}) is device
    assert overruled(device, {"memory": 5e9, "within": None}).memory == 5e9
    with pytest.raises(ConfigError, match="memory is -1"):
        overruled(device, {"memory": -1.0})


def test_a_measured_profile(tmp_path: Path) -> None:
    path, device = tmp_path / "profile.json", preset("H100", "bfloat16")
    path.write_text(json.dumps({
        "flops_per_s": 4e14, "memory_bytes": 7e10, "bandwidth": {"tp": 3e11, "dp": None}, "versions": {"torch": "2"},
        "actions": {"layer_forward": 1e-6, "layer_backward": 2e-6, "head": 3e-6},
    }))  # fmt: skip
    found = read_profile(str(path), device)
    assert (found.flops_per_s, found.memory, found.link("tp", 99)) == (4e14, 7e10, 3e11)
    assert found.link("dp", 99) == device.between, "what wasn't measured is the preset's"
    assert found.actions["head"] == 3e-6


def test_what_a_check_of_the_cluster_wrote(tmp_path: Path) -> None:
    """Two machines of two ranks: the slowest rank counts, and the slowest groups within and across machines."""

    def link(operation: str, *groups: tuple[list[int], float]) -> dict:
        return {"operation": operation, "groups": [{"ranks": r, "bytes_per_second": b} for r, b in groups]}

    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({
        "ranks_per_machine": 2,
        "ranks": [{"flops_per_second": f, "memory_bytes_per_second": 2e12} for f in (5e14, 4e14, 5e14, 5e14)],
        "links": [
            link("all_reduce", ([0, 1], 2e11), ([2, 3], 1e11)), link("all_reduce", ([0, 2], 2e10), ([1, 3], 3e10)),
            link("send_recv", ([0, 1], 1.0)),
        ],
    }))  # fmt: skip
    found = read_profile(str(path), preset("H100", "bfloat16"))
    assert found.flops_per_s == pytest.approx(0.7 * 4e14)
    assert (found.memory_bandwidth, found.per_node) == (2e12, 2)
    assert (found.link("tp", 2), found.link("dp", 4)) == (1e11, 2e10)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid JSON"),
        ("[]", "expected an object"),
        ('{"flops_per_s": "fast"}', "flops_per_s is 'fast', expected a number above 0"),
        ('{"bandwidth": {"tp": 0}}', "bandwidth.tp is 0"),
        ('{"bandwidth": 3}', "bandwidth is an object with tp, dp, pp"),
        ('{"ranks": [3]}', "ranks and links are not as tools/check_cluster.py writes them"),
        ('{"actions": {"head": 1}}', "actions needs all of layer_forward"),
    ],
)
def test_broken_profiles_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        read_profile(str(path), preset("H100", "bfloat16"))


def test_a_profile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_profile(str(tmp_path / "none.json"), preset("H100", "bfloat16"))
