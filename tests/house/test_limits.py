"""Size limits in statements: a file or a function that grows large contains a second idea, however it is wrapped."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from places import ROOT

FILE = 220
"""Most statements of a source file, docstrings excluded."""
FUNCTION = 40
"""Most statements of a function, including those of nested functions."""
LOOP = ("finetune/train.py", "train")
"""The training loop reads as one story from top to bottom, and may be longer."""
LOOP_FUNCTION = 80
FOLDER = 20
"""Most source files in a folder of `data`, `finetune` and `moe`; `launchers` has a file for each command."""
PACKED = 3
"""An assignment must not unpack this many values into names; a pair, a swap and a call's results are allowed."""

SOURCES = ("benchmarks", "configs", "data", "finetune", "launchers", "moe")
ROOMS = ("data", "finetune", "moe")


def _files(*tops: str) -> Iterator[Path]:
    for top in tops:
        yield from sorted(path for path in (ROOT / top).rglob("*.py"))


def _sources() -> Iterator[tuple[str, ast.Module]]:
    for path in _files(*SOURCES):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def _statements(node: ast.AST) -> int:
    """Count the statements below a node, excluding itself."""
    inside = [child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node]
    return sum(not _is_text(statement) for statement in inside)


def _is_text(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _is_packed(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and len(node.value.elts) >= PACKED
        and any(isinstance(target, ast.Tuple) for target in node.targets)
    )


def test_files_and_functions_stay_short() -> None:
    long = []
    for name, tree in _sources():
        long += [f"{name}: {_statements(tree)} of {FILE}"] if _statements(tree) > FILE else []
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                limit = LOOP_FUNCTION if (name, node.name) == LOOP else FUNCTION
                long += [f"{name}, {node.name}: {_statements(node)} of {limit}"] if _statements(node) > limit else []
    assert not long, "statements, and the number allowed: " + "; ".join(long)


def test_folders_stay_small() -> None:
    sizes = Counter(str(path.parent.relative_to(ROOT)) for path in _files(*ROOMS))
    assert not {folder: size for folder, size in sizes.items() if size > FOLDER}


def test_no_assignment_packs_three_values() -> None:
    packed = [f"{name}:{node.lineno}" for name, tree in _sources() for node in ast.walk(tree) if _is_packed(node)]
    assert not packed, "one line for each name: " + ", ".join(packed)


def test_the_formatter_has_no_exceptions() -> None:
    mark = "# fmt: " + "skip"
    skipped = [str(path.relative_to(ROOT)) for path in _files(*SOURCES, "tests") if mark in path.read_text()]
    assert not skipped, f"restructure code that formats badly instead of using {mark}: " + ", ".join(skipped)
