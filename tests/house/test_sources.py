"""What neither ruff nor import-linter sees in the sources, one rule a test."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.files import PACKAGE, ROOT, dotted, parsed, product_sources, shown

# the second reads back what it has just written, to compare
UNPICKLERS = {PACKAGE / "checkpoint" / "safe.py", ROOT / "benchmarks" / "checkpoint.py"}
DEVICES = PACKAGE / "parallel"
CATCH_ALL_NAMES = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
# tools/checkpoint/util.py is EE-LLM's name for its converter
KEPT_NAMES = {"tools/checkpoint/util.py"}

UNPICKLING = {
    "torch.load", "torch.serialization.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load",
    "marshal.loads", "shelve.open", "dill.load", "joblib.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "eval", "exec",
}  # fmt: skip
RANKS = {
    "get_rank", "get_world_size", "init_process_group", "destroy_process_group", "new_group", "init_device_mesh",
    "get_backend",
}  # fmt: skip
LAUNCHER_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"}


def found_in(sources: list[Path], offends) -> list[str]:
    """`file:line what` for every node of `sources` about which `offends` says something."""
    return [
        f"{shown(path)}:{node.lineno}: {said}"
        for path in sources
        for node in ast.walk(parsed(path))
        if (said := offends(node))
    ]


def calls(node: ast.AST, names: set[str]) -> str:
    return dotted(node.func) if isinstance(node, ast.Call) and dotted(node.func) in names else ""


def has_true(node: ast.Call, keyword: str) -> bool:
    return any(
        k.arg == keyword and not (isinstance(k.value, ast.Constant) and not k.value.value) for k in node.keywords
    )


def global_statement(node: ast.AST) -> str:
    return f"global {', '.join(node.names)}" if isinstance(node, ast.Global) else ""


def unpickling(node: ast.AST) -> str:
    if isinstance(node, ast.Call) and dotted(node.func) in {"np.load", "numpy.load"} and has_true(node, "allow_pickle"):
        return "numpy.load with allow_pickle"
    return calls(node, UNPICKLING)


def device_or_rank(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute) and dotted(node).startswith(("torch.cuda.", "torch.mps.", "torch.xpu.")):
        return dotted(node)
    if isinstance(node, ast.Call):
        name = dotted(node.func).rpartition(".")[2] or getattr(node.func, "attr", "")
        if name in RANKS or (name == "cuda" and isinstance(node.func, ast.Attribute)):
            return f"{name}()"
    if isinstance(node, ast.Constant) and node.value in LAUNCHER_VARIABLES:
        return f"the launcher's {node.value}"
    return ""


def ends_the_process(node: ast.AST) -> str:
    return calls(node, {"sys.exit", "os._exit", "exit", "quit"})


def printing(node: ast.AST) -> str:
    return calls(node, {"print", "pprint"})


# A rule: what it looks for, and the files it doesn't bind.
RULES = {
    "state is passed, not global": (global_statement, lambda path: False),
    "only checkpoint/safe.py opens pickles": (unpickling, lambda path: path in UNPICKLERS),
    # testing/ may start rank processes of its own
    "only parallel/ knows devices and ranks": (
        device_or_rank,
        lambda path: PACKAGE not in path.parents or DEVICES in path.parents or PACKAGE / "testing" in path.parents,
    ),
    "only commands end the process": (
        ends_the_process,
        lambda path: PACKAGE not in path.parents or PACKAGE / "cli" in path.parents,
    ),
    "output goes through logging or sys.stdout": (printing, lambda path: False),
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: str) -> None:
    offends, excepted = RULES[rule]
    assert found_in([path for path in product_sources() if not excepted(path)], offends) == []


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ("state is passed, not global", "def f():\n    global x\n    x = 1"),
        ("only checkpoint/safe.py opens pickles", "state = torch.load(path)"),
        ("only checkpoint/safe.py opens pickles", "rows = np.load(path, allow_pickle=True)"),
        ("only parallel/ knows devices and ranks", "torch.cuda.synchronize()"),
        ("only parallel/ knows devices and ranks", "x = torch.zeros(1).cuda()"),
        ("only parallel/ knows devices and ranks", "rank = dist.get_rank()"),
        ("only parallel/ knows devices and ranks", "world = os.environ['WORLD_SIZE']"),
        ("only commands end the process", "sys.exit(1)"),
        ("output goes through logging or sys.stdout", "print('done')"),
    ],
)
def test_rules_bite(rule: str, line: str) -> None:
    offends, _ = RULES[rule]
    assert any(offends(node) for node in ast.walk(ast.parse(line)))


def test_package_inits_are_empty() -> None:
    """Imports in an `__init__` would tie rooms together; the top one lets NVIDIA's megatron-core stand beside us."""
    inits = {path for path in product_sources() if path.name == "__init__.py"}
    full = [shown(path) for path in inits if path.read_text(encoding="utf-8").strip()]
    assert full == ["megatron/__init__.py"]
    assert (PACKAGE / "__init__.py").read_text(encoding="utf-8").count("\n") <= 3


def test_no_catch_all_modules() -> None:
    names = [shown(path) for path in product_sources() if path.name in CATCH_ALL_NAMES]
    assert sorted(set(names) - KEPT_NAMES) == []


def undocumented(path: Path) -> Iterator[str]:
    """Public modules, classes, functions and methods without a docstring."""
    tree = parsed(path)
    if path.name != "__init__.py" and not ast.get_docstring(tree):
        yield f"{shown(path)}: the module"
    for node in tree.body:
        yield from undocumented_definition(node, shown(path))


def undocumented_definition(node: ast.stmt, where: str) -> Iterator[str]:
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
        return
    where = f"{where}: {node.name}"
    if not (ast.get_docstring(node) or speaks_for_itself(node)):
        yield where
    if isinstance(node, ast.ClassDef) and not overrides(node):
        for member in node.body:
            yield from undocumented_definition(member, where)


def speaks_for_itself(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """One-line bodies, setters (their property has the docstring), and config rules: their message is the text."""
    if isinstance(node, ast.ClassDef):
        return False
    is_setter = any(dotted(decorator).endswith(".setter") for decorator in node.decorator_list)
    is_rule = node.returns is not None and dotted(node.returns) == "Faults"
    return is_setter or is_rule or len(node.body) == 1


def overrides(node: ast.ClassDef) -> bool:
    """Whether the class has a base whose docstrings its methods may inherit."""
    return any(dotted(base) not in {"Enum", "str", "NamedTuple", "Protocol", "ABC"} for base in node.bases)


def test_public_names_are_documented() -> None:
    lines = [line for path in product_sources() for line in undocumented(path)]
    assert not lines, "\n".join(lines)
