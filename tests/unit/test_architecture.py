"""The shape of the house: imports run downwards and in no circle, and what is to be read stays small."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "cutlayer"
FILES = {
    ".".join(("cutlayer", *file.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(SOURCE.rglob("*.py"))
}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}

# From the top down, as in docs/architecture.md: a package imports from itself and from those that follow.
# fmt: off
ORDER = (
    "__main__", "cli", "studies", "planning", "runs", "device", "backends", "training", "report", "records", "method",
    "fleet", "metric", "strategies", "stopping", "regularize", "privacy", "models", "data", "memory", "wire", "codecs",
    "schedule", "describe", "files", "durable", "temporary", "stop_request", "seeds", "naming", "formats", "streams",
    "errors",
)
# fmt: on

# Imported in a function: what comes with an extra, or is slow to import and seldom needed.
LATE = {"PIL", "cutlayer.backends.ray", "cutlayer.cli.remote", "dp_accounting", "grpc"}
LATE |= {"jinja2", "matplotlib", "onnxruntime", "onnxscript", "pandas", "prometheus_client", "ray", "sklearn"}
LATE |= {"torch.utils.tensorboard"}
# For its types alone: what comes with an extra.
TYPES_ONLY = {"matplotlib"}

MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_ARGUMENTS = 300, 60, 6
# Longer than that for now.
LONG_FILES: set[str] = set()
MANY_ARGUMENTS: set[str] = set()


def imports(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Modules that are imported in here, with their lines; of this package the module that a name is from."""
    for each in ast.walk(node):
        if isinstance(each, ast.ImportFrom):
            assert each.level == 0, "relative imports"
            for alias in each.names:
                whole = f"{each.module}.{alias.name}"
                yield (whole if whole in FILES else str(each.module)), each.lineno
        elif isinstance(each, ast.Import):
            yield from ((alias.name, each.lineno) for alias in each.names)


def path(name: str) -> str:
    return FILES[name].relative_to(SOURCE).as_posix()


def allowed(module: str, among: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in among)


GRAPH = {
    name: {module for module, _ in imports(tree) if module in FILES and module != name} for name, tree in TREES.items()
}


def test_no_circle_of_imports() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other: {' -> '.join(error.args[1])}")


def test_imports_run_downwards() -> None:
    def rank(name: str) -> int:
        return ORDER.index(name.split(".")[1])

    inner = {name: modules for name, modules in GRAPH.items() if name != "cutlayer"}  # which only hands on names
    upwards = [f"{name} -> {to}" for name, modules in inner.items() for to in modules if rank(to) < rank(name)]
    assert not upwards


def test_the_page_has_the_tree_in_this_order() -> None:
    page = (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.partition("```text\n")[2].partition("```")[0]
    names = [name for line in tree.splitlines() if re.match(r"  \w", line) for name in re.split(r"  +", line)]
    assert tuple(name.removesuffix("/") for name in names if name.removesuffix("/") in ORDER) == ORDER[1:]


def test_no_import_is_hidden() -> None:
    hidden = []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                hidden += [(name, *each) for each in imports(node) if not allowed(each[0], TYPES_ONLY)]
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                hidden += [(name, *each) for each in imports(node) if not allowed(each[0], LATE)]
    assert not hidden


def test_files_are_short() -> None:
    lines = {path(name): len(file.read_text(encoding="utf-8").splitlines()) for name, file in FILES.items()}
    assert {name for name, count in lines.items() if count > MOST_LINES} <= LONG_FILES


def test_functions_are_short() -> None:
    """Without the docstring: what it says of each argument is for those who call it."""
    functions = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not {each.name for each in functions if lines_of_code(each) > MOST_LINES_OF_A_FUNCTION}


def lines_of_code(function: ast.FunctionDef) -> int:
    first = function.body[0]
    docstring = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function) is not None else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def test_constructors_take_few_arguments_or_say_why_not() -> None:
    many = set()
    for name, tree in TREES.items():
        text = FILES[name].read_text(encoding="utf-8").splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                signature = text[node.lineno - 2 : node.body[0].lineno - 1]
                count = len(node.args.args) - 1 + len(node.args.kwonlyargs)
                if count > MOST_ARGUMENTS and not any("#" in line for line in signature):
                    many.add(path(name))
    assert many <= MANY_ARGUMENTS
