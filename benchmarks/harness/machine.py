"""The origin of a figure: commit, versions and machine. Loads no torch."""

import hashlib
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / "gpu-kit"
"""The folder that `make gpu-kit` creates in the tree."""
_SOURCES = ("benchmarks", "configs", "data", "finetune", "launchers", "moe", "tests")
_DISTRIBUTIONS = ("moetune", "torch", "transformers", "deepspeed", "peft", "webdataset", "numpy")


def surroundings() -> dict[str, object]:
    """Return the facts that every record contains in addition to its figure."""
    return {"commit": commit(ROOT), "versions": versions(), "machine": machine()}


def commit(root: Path) -> str:
    """Return the commit of the clone at `root`, marked as dirty if it has changes.

    Without git, return the commit of the GPU kit, marked as dirty if the source differs from the kit's; without a kit,
    return the installed version.
    """
    if _git(root, "rev-parse", "--show-toplevel") == str(root):  # an environment inside another clone is not ours
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        if head:
            return f"{head}-dirty" if _git(root, "status", "--porcelain") else head
    if (root / KIT.name / "commit").is_file():
        kit_commit, digest = (root / KIT.name / "commit").read_text().splitlines()
        return kit_commit if digest == source_digest(root) or kit_commit.endswith("-dirty") else f"{kit_commit}-dirty"
    return f"version {_version('moetune')}"


def source_digest(root: Path) -> str:
    """Return a digest of the tree's Python files and recipes."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".yaml", ".sh"):
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the distributions that can affect a figure; None if not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _DISTRIBUTIONS}}


def machine() -> dict[str, object]:
    """Return processor, usable cores, memory, current load and GPUs."""
    return {
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
        "gpu": gpus(),
    }


def gpus() -> list[str]:
    """Return the name and memory of each GPU that the driver reports."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"], capture_output=True, text=True
    )
    return done.stdout.splitlines() if done.returncode == 0 else []


def _git(root: Path, *arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _field(path: Path, name: str) -> str | None:
    if not path.exists():
        return None
    lines = (line.partition(":") for line in path.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), None)
