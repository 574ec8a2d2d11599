"""The lock covers all requirements of the project, and every installation uses it."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from locked import LOCK, LOCKED, PROJECT, requirements
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from places import ROOT

EXTRAS = PROJECT["project"]["optional-dependencies"]
OURS = set(PROJECT["tool"]["setuptools"]["packages"]["find"]["include"])
PEERS = {"liger_kernel", "bitsandbytes"}  # measured beside ours where they are installed


def test_every_required_package_is_locked_within_its_range() -> None:
    named = [*requirements(*EXTRAS), *map(Requirement, PROJECT["dependency-groups"]["oracle"])]
    outside = {str(one): LOCKED.get(canonicalize_name(one.name)) for one in named}
    assert not {
        text: found
        for text, found in outside.items()
        if found is None or not Requirement(text).specifier.contains(found, prereleases=True)
    }


def test_one_release_of_each_package_for_every_python_and_platform() -> None:
    """CI runs the releases that a GPU node installs; CUDA's packages are needed only where torch requires them."""
    assert len(LOCKED) == len(LOCK)
    assert LOCKED["torch"] == "2.13.0", "CI has a CPU build of this release"
    cuda = [one for one in LOCK if one.name.startswith(("nvidia-", "cuda-", "triton"))]
    assert len(cuda) > 10
    assert all('sys_platform == "linux"' in str(one.marker) for one in cuda)


@pytest.mark.parametrize("page", ["Makefile", "Dockerfile", "README.md", "docs/training.md", "docs/stability.md"])
def test_every_installation_uses_the_lock(page: str) -> None:
    text = (ROOT / page).read_text().replace("\\\n", " ")
    installs = re.findall(r"^.*\bpip install.*$", text, re.MULTILINE)
    free = ("uv", "wheel", "--resolution")  # tools with their own environment, and runs outside the lock on purpose
    loose = [line for line in installs if "-c constraints.txt" not in line and not any(word in line for word in free)]
    assert not loose
    assert page != "Makefile" or installs


def test_the_table_of_versions_in_the_docs() -> None:
    rows = re.findall(
        r"^\| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", (ROOT / "docs" / "stability.md").read_text(), re.MULTILINE
    )
    table = {name: (oldest, locked) for name, oldest, locked, _ in rows if name in LOCKED}
    assert set(table) >= {"torch", "transformers", "deepspeed", "peft"}
    least = {
        one.name: str(next(part.version for part in one.specifier if part.operator == ">=")) for one in requirements()
    }
    for name, (oldest, locked) in table.items():
        assert locked == LOCKED[name]
        assert f"{oldest}.0.0".startswith(f"{least[name]}."), (
            f"{name}: the page says {oldest}, pyproject.toml {least[name]}"
        )


def test_every_package_that_a_benchmark_imports_comes_with_the_extra_test() -> None:
    named = {canonicalize_name(one.name) for one in requirements("test", "demo")}
    sources = packages_distributions()
    missing = {}
    for path in (ROOT / "benchmarks").rglob("*.py"):
        for module in _imported(path) - OURS - PEERS - sys.stdlib_module_names:
            distributions = {canonicalize_name(name) for name in sources.get(module, ())}
            if not distributions & named:
                missing[module] = path.name
    assert not missing


def _imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.partition(".")[0] for name in names}
