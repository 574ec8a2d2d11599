"""The releases that constraints.txt locks, and the requirements in pyproject.toml."""

import tomllib
from importlib.metadata import PackageNotFoundError, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
LOCKED = {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in LOCK}


def requirements(*extras: str) -> list[Requirement]:
    """Return the project's own requirements, and those of these extras."""
    optional = PROJECT["project"]["optional-dependencies"]
    return [
        Requirement(text) for text in sum((optional[extra] for extra in extras), PROJECT["project"]["dependencies"])
    ]


def direct() -> set[str]:
    """Return the packages that moetune itself imports."""
    return {canonicalize_name(one.name) for one in requirements()}


def is_locked(name: str) -> bool:
    """Return whether the locked release is installed; a local part (+cpu, +cu130) names the build, not the release."""
    try:
        return Version(version(name)).public == LOCKED[name]
    except PackageNotFoundError:
        return False
