"""The image for GPUs, as far as it can be checked without building it: its Dockerfile, compared with the lock."""

import re
from collections.abc import Iterator

from locked import LOCKED, PROJECT
from places import ROOT


def _steps() -> Iterator[tuple[str, str]]:
    """Yield the instructions of the Dockerfile, with continuation lines joined."""
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, words = line.partition(" ")
        yield name, words


def test_the_image_uses_existing_files_and_the_locked_cuda() -> None:
    steps = list(_steps())
    assert {name for name, _ in steps} <= {"FROM", "ENV", "RUN", "COPY", "WORKDIR", "ENTRYPOINT", "CMD"}
    ((_, image),) = [step for step in steps if step[0] == "FROM"]
    cuda, system = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-devel-(ubuntu24\.04)", image).groups()
    assert LOCKED["cuda-toolkit"].startswith(f"{cuda}."), "code that compiles against torch needs torch's CUDA"
    assert system == "ubuntu24.04", "its python3 is 3.12"
    copied = [words.split()[0] for name, words in steps if name == "COPY"]
    assert copied == ["constraints.txt", "."]
    assert all((ROOT / path).exists() for path in copied)
    assert [words for name, words in steps if name == "ENTRYPOINT"] == ['["moetune"]']
    assert list(PROJECT["project"]["scripts"]) == ["moetune"]
    assert all((ROOT / name).exists() for name in PROJECT["project"]["license-files"])
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv*", "runs"} <= set(ignored)
