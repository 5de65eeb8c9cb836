"""What no file of the project may say: paths of somebody's machine, hosts of package registries."""

import re

from tests.house.files import shown, tracked

# written so that this file does not say it either
MACHINE_PATHS = re.compile(r"(?<![\w.~])/(?:wor[k]|roo[t]|hom[e]/\w+|Use[r]s/\w+|tmp/e[e])/")
REGISTRIES = re.compile(
    r"py[p]i\.org|python[h]osted\.org|download\.py[t]orch\.org|anacond[a]\.org|nv[c]r\.io|docke[r]\.io|ghc[r]\.io", re.I
)
BINARY = {".png", ".jpg", ".bin", ".idx", ".npy", ".npz", ".pt", ".model"}


def lines_with(pattern: re.Pattern) -> list[str]:
    found = []
    for path in tracked():
        if path.suffix not in BINARY:
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [f"{shown(path)}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if pattern.search(line)]
    return found


def test_no_paths_of_a_machine() -> None:
    assert lines_with(MACHINE_PATHS) == []


def test_no_registry_hosts() -> None:
    assert lines_with(REGISTRIES) == []


def test_patterns_match() -> None:
    slash = "/"
    assert MACHINE_PATHS.search(f"cd {slash}root{slash}x")
    assert MACHINE_PATHS.search(f"{slash}home{slash}someone{slash}x")
    assert not MACHINE_PATHS.search("runs/work/x, ../work/y, https://host/root/z")
    assert REGISTRIES.search("py" + "pi.org")
