"""The image for GPUs, as far as it can be looked at without building it: its file, and the locked set in it."""

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = dict(
    line.split("==") for line in (ROOT / "requirements-gpu.txt").read_text().splitlines() if not line.startswith("#")
)


def _steps() -> Iterator[tuple[str, str]]:
    """The instructions of the Dockerfile, each with all of its lines."""
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, words = line.partition(" ")
        yield name, words


def test_the_image_is_made_of_what_is_there() -> None:
    steps = list(_steps())
    assert {name for name, _ in steps} <= {"FROM", "ENV", "RUN", "COPY", "WORKDIR", "ENTRYPOINT", "CMD"}
    ((_, image),) = [step for step in steps if step[0] == "FROM"]
    cuda, system = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-devel-(ubuntu24\.04)", image).groups()
    assert LOCK["cuda-toolkit"].startswith(f"{cuda}."), "what compiles against torch must be of torch's CUDA"
    assert system == "ubuntu24.04", "its python3 is 3.12"
    copied = [words.split()[0] for name, words in steps if name == "COPY"]
    assert copied == ["requirements-gpu.txt", "."]
    assert all((ROOT / path).exists() for path in copied)
    assert [words for name, words in steps if name == "ENTRYPOINT"] == ['["moetune"]']
    assert list(PROJECT["scripts"]) == ["moetune"]
    assert all((ROOT / name).exists() for name in PROJECT["license-files"])
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)


def test_the_locked_set_is_what_the_project_and_its_packages_ask_for() -> None:
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["wandb"]]
    missing = [text for text in wanted if not _is_met(Requirement(text))]
    assert not missing
    assert list(LOCK) == sorted(LOCK, key=str.lower)


def test_each_locked_package_finds_what_it_asks_for() -> None:
    """By what is installed here, where that is the locked version; what belongs to torch's build for GPUs is not."""
    asked, looked_at = [], 0
    for name, version in LOCK.items():
        try:
            here = distribution(name)
        except PackageNotFoundError:
            continue
        if here.version.partition("+")[0] == version:
            looked_at += 1
            asked += [(name, Requirement(text)) for text in here.requires or ()]
    if not looked_at:
        pytest.skip("other versions than the locked ones are installed here")
    assert not [f"{name}: {one}" for name, one in asked if _applies(one) and not _is_met(one)]


def _applies(one: Requirement) -> bool:
    return one.marker is None or one.marker.evaluate({"extra": "", "python_version": "3.12"})


def _is_met(one: Requirement) -> bool:
    locked = {canonicalize_name(name): version for name, version in LOCK.items()}
    found = locked.get(canonicalize_name(one.name))
    return found is not None and one.specifier.contains(found, prereleases=True)
