"""The versions that are tested, of the packages whose insides we build on. Loads none of them."""

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
"""As pyproject.toml has them, which does not lie beside an installed package; a test compares the two."""
WHY = {
    "deepspeed": "older ones leak and misreduce the experts of ZeRO-3",
    "peft": "older ones do not read adapters on stacks of experts",
}


def installed_versions(names: Iterable[str] = TESTED) -> dict[str, str]:
    """Of these packages, those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def untested(installed: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The installed packages whose version is outside its tested range, with that version."""
    for name, allowed in TESTED.items():
        least, _, end = allowed.removeprefix(">=").partition(",<")
        if name in installed and not numbers(least) <= numbers(installed[name]) < numbers(end):
            yield name, installed[name]


def demand(name: str) -> str:
    """The range that is wanted of a package, and what older ones did wrong."""
    return f"moetune is tested with {name}{TESTED[name]}" + (f" ({WHY[name]})" if name in WHY else "")


def command(name: str) -> str:
    """What installs a tested version."""
    return f"pip install '{name}{TESTED[name]}'"


def torch_problem() -> str:
    """Say what is wrong with the torch that is installed, in one sentence; nothing when it is a tested one."""
    found = installed_versions(["torch"])
    if not found and find_spec("torch") is None:
        return f"torch is not installed, and {demand('torch')}: {command('torch')}"
    wrong = "".join(have for _, have in untested(found))
    return f"torch {wrong} is installed, and {demand('torch')}: {command('torch')}" if wrong else ""


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of a version, up to the first part that is none; a name without any is older than all."""
    found = re.match(r"\d+(\.\d+)*", text.strip())
    return tuple(int(part) for part in found[0].split(".")) if found else ()
