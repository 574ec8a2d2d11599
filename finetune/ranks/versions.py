"""The tested versions of the packages whose internals we rely on. Loads none of them."""

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

TESTED = {
    "torch": ">=2.11,<2.16",
    "deepspeed": ">=0.19.8,<0.20",
    "transformers": ">=5.23,<6",
    "peft": ">=0.21,<1",
}
"""The same ranges as in pyproject.toml, which is not installed with the package; a test compares the two."""
WHY = {
    "deepspeed": "older versions leak and misreduce the experts of ZeRO-3",
    "peft": "older versions do not read adapters on stacks of experts",
}


def installed_versions(names: Iterable[str] = TESTED) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def untested(installed: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the installed packages whose version is outside its tested range, with that version."""
    for name, allowed in TESTED.items():
        least, _, end = allowed.removeprefix(">=").partition(",<")
        if name in installed and not numbers(least) <= numbers(installed[name]) < numbers(end):
            yield name, installed[name]


def demand(name: str) -> str:
    """Say which range of a package is tested, and what is wrong with older versions."""
    return f"moetune is tested with {name}{TESTED[name]}" + (f" ({WHY[name]})" if name in WHY else "")


def command(name: str) -> str:
    """Return the command that installs a tested version."""
    return f"pip install '{name}{TESTED[name]}'"


def torch_problem() -> str:
    """Say what is wrong with the installed torch, in one sentence; "" if its version is tested."""
    installed = installed_versions(["torch"])
    if not installed and find_spec("torch") is None:
        return f"torch is not installed, and {demand('torch')}: {command('torch')}"
    wrong = "".join(torch_version for _, torch_version in untested(installed))
    return f"torch {wrong} is installed, and {demand('torch')}: {command('torch')}" if wrong else ""


def numbers(text: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with; a version without any is older than all others."""
    digits = re.match(r"\d+(\.\d+)*", text.strip())
    return tuple(int(part) for part in digits[0].split(".")) if digits else ()
