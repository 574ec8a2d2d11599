"""House rules that no linter checks: a start without torch, and the files that may use torch.distributed."""

import ast
import os
import subprocess
import sys

import pytest
import torch
from limits import LIMIT_S
from places import ROOT

COLLECTIVES_LIVE_IN = {
    f"finetune/{name}.py"
    for name in (
        "ranks/collectives",
        "ranks/flight",
        "ranks/torchrun",
        "model/weights",
        "model/gather",
        "model/sequence",
        "checkpoint/checkpoints",
        "checkpoint/pieces",
        "preflight/cluster_check",
    )
}
ENGINE_LIVES_IN = {
    "finetune/ranks/engine.py",
    "finetune/ranks/hooks.py",
    "finetune/model/weights.py",
    "moe/parallel.py",
}


def _sources() -> dict[str, ast.Module]:
    packages = ("configs", "data", "finetune", "launchers", "moe")
    paths = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


def _imports(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


def _uses(tree: ast.Module, module: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in _imports(tree))


def test_collectives_and_engine_stay_in_their_files() -> None:
    sources = _sources()
    collective = {name for name, tree in sources.items() if _uses(tree, "torch.distributed")}
    assert {name for name in collective if not name.startswith("moe/")} <= COLLECTIVES_LIVE_IN
    assert {name for name, tree in sources.items() if _uses(tree, "deepspeed")} <= ENGINE_LIVES_IN


def test_configuration_and_command_line_start_without_torch() -> None:
    modules = (
        "data.config, moe.config, finetune.config, finetune.settings.recipes, finetune.settings.checks, "
        "finetune.settings.derive"
    )
    launchers = ", ".join(f"launchers.{path.stem}" for path in (ROOT / "launchers").glob("[!_]*.py"))
    heavy = "{'torch', 'transformers', 'deepspeed'}"
    checked = "launchers.cli.main(['check', 'tiny-cpu'])"
    script = f"import sys, {modules}, {launchers}; {checked}; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_starts_with_its_long_files_and_one_thread(request: pytest.FixtureRequest) -> None:
    conftest = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    names = list(dict.fromkeys(str(item.path.relative_to(conftest.TESTS)) for item in request.session.items))
    long = [name for name in conftest.LONG_FIRST if name in names]
    assert names[: len(long)] == long
    assert request.config.option.loadscopereorder is False  # pytest-xdist must keep the order
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
