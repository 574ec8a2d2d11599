"""Settings of the test tools for the whole suite: time, warnings, and the table of versions."""

import platform
from importlib.metadata import version

import pytest
from hypothesis import settings
from locked import LOCKED, direct, is_locked

settings.register_profile("moetune", deadline=None)  # a busy machine must not fail a property
settings.load_profile("moetune")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--versions", action="store_true", help="end with a table of versions; every warning is an error")


def pytest_configure(config: pytest.Config) -> None:
    """Outside the lock, what a library deprecates today must not fail who only wants to know whether moetune works."""
    if config.getoption("--versions") or all(map(is_locked, LOCKED.keys() & direct())):
        return
    for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"default::{kind}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--versions"):
        return
    counts = [f"{len(terminalreporter.stats[key]):,} {key}" for key in ("passed", "failed", "error", "skipped")
              if terminalreporter.stats.get(key)]  # fmt: skip
    rows = [
        ("python", platform.python_version(), ""),
        *((name, version(name), LOCKED[name]) for name in sorted(direct())),
    ]
    terminalreporter.write_line("")
    for row in [("package", "here", "locked"), ("---",) * 3, *rows, ("result", ", ".join(counts), "")]:
        terminalreporter.write_line(f"| {' | '.join(row)} |")
