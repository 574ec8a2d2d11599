"""Settings of the test tools for the whole suite: threads, the order of files, warnings, the table of versions."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import settings
from locked import LOCKED, direct, is_locked

# Two workers and the ranks that they start share the cores: with more threads each, most of the CPU time is theirs that
# wait for one another. Torch and BLAS read it at import, which comes later.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("moetune", deadline=None)  # a busy machine must not fail a property
settings.load_profile("moetune")

TESTS = Path(__file__).parent
LONG_FIRST = (
    "training/test_train.py",
    "ranks/test_ended_runs.py",
    "experts/test_parallel.py",
    "planner/test_plan_measured.py",
    "model/test_parity.py",
    "training/test_checkpoint.py",
    "model/test_weights.py",
    "training/test_mistakes_in_run.py",
    "ranks/test_launch.py",
    "house/test_benchmarks.py",
    "training/test_evaluation.py",
    "training/test_stages.py",
    "verify/test_merged.py",
    "model/test_forward_ranks.py",
    "model/test_sequence.py",
    "house/test_ranks_helper.py",
    "planner/test_plan_256.py",
    "training/test_demo.py",
)
"""Files that take long, longest first: workers begin with them, so that none is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {TESTS / name: place for place, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(LONG_FIRST)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--versions", action="store_true", help="end with a table of versions; every warning is an error")


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # else pytest-xdist hands out files by their number of tests
    missing = [name for name in LONG_FIRST if not (TESTS / name).exists()]
    if missing:
        raise pytest.UsageError(
            f"LONG_FIRST in {__file__} names {', '.join(missing)}: no such files. Name them as they are now"
        )
    if config.getoption("--versions") or all(map(is_locked, LOCKED.keys() & direct())):
        return  # outside the lock, what a library deprecates today must fail nobody
    for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"default::{kind}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--versions"):
        return
    counts = [
        f"{len(terminalreporter.stats[key]):,} {key}"
        for key in ("passed", "failed", "error", "skipped")
        if terminalreporter.stats.get(key)
    ]
    rows = [
        ("python", platform.python_version(), ""),
        *((name, version(name), LOCKED[name]) for name in sorted(direct())),
    ]
    terminalreporter.write_line("")
    for row in [("package", "here", "locked"), ("---",) * 3, *rows, ("result", ", ".join(counts), "")]:
        terminalreporter.write_line(f"| {' | '.join(row)} |")
