"""`moetune env`: print the facts about a machine that an issue report needs."""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from finetune.ranks.versions import TESTED, installed_versions, untested

EXAMPLE = """\
  moetune env              # paste it into an issue
  moetune env --json"""

PACKAGES = (
    *("torch", "transformers", "deepspeed", "peft", "flash-attn", "deep_ep", "tokenizers", "safetensors", "accelerate"),
    *("huggingface-hub", "numpy", "av", "pillow", "simplejpeg", "omegaconf", "wandb", "triton"),
    *("nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
)
"""Packages whose releases matter. Missing ones are left out, except for those with a tested range."""
GPU = "index,name,memory.total,memory.used,driver_version,compute_cap"
"""Properties of each GPU that nvidia-smi prints."""
VARIABLES = (
    "CUDA_",
    "DS_",
    "FI_",
    "GLOO_",
    "HF_",
    "MASTER_",
    "MOETUNE_",
    "NCCL_",
    "OMP_",
    "PYTORCH_",
    "SLURM_",
    "TORCH_",
)
"""Prefixes of the variables that affect a run."""
NAMED = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "PYTHONPATH", "RANK", "TOKENIZERS_PARALLELISM", "WANDB_MODE", "WORLD_SIZE")
SECRET = ("AUTH", "CREDENTIAL", "KEY", "PASS", "SECRET", "TOKEN")
"""Parts of variables' names whose values are never printed."""
_PATIENCE_S = 60
"""Seconds that nvidia-smi may take. Its first call after a boot is slow."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    report = environment()
    print(json.dumps(report) if args.json else "\n".join(_lines(report)))
    return 0


def environment() -> dict[str, Any]:
    """Return all facts by name, ready for JSON, without importing any of the packages."""
    return {
        "moetune": _ours(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.platform()}, {_glibc()}",
        "packages": packages(installed_versions(PACKAGES)),
        "cuda_home": os.environ.get("CUDA_HOME") or shutil.which("nvcc") or "none",
        "gpus": _gpus(),
        "cpus": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "memory": _memory(Path("/proc/meminfo").read_text()),
        "shared_memory": _disk(Path("/dev/shm")),
        "disk": f"{Path.cwd()}: {_disk(Path.cwd())}",
        "variables": variables(os.environ),
    }


def packages(installed: Mapping[str, str]) -> dict[str, str]:
    """Return the release of each package, with a note if it is untested; packages that may be missing are left out."""
    outside = dict(untested(installed))
    ranges = {name: f", outside the tested {TESTED[name]}" for name in outside}
    named = [name for name in PACKAGES if name in installed or name in TESTED]
    return {name: installed.get(name, "not installed") + ranges.get(name, "") for name in named}


def variables(values: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that affect a run; of those that may be secret, only the fact that they are set."""
    chosen = sorted(name for name in values if name.startswith(VARIABLES) or name in NAMED)
    return {name: "(set, not shown)" if any(word in name for word in SECRET) else values[name] for name in chosen}


def _ours() -> str:
    """Return moetune's release, with the commit of a clone or of an installation from one."""
    try:
        release = version("moetune")
        origin = json.loads(distribution("moetune").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        release, origin = "not installed", {}
    commit = origin.get("vcs_info", {}).get("commit_id") or _asked(
        "git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty", "--abbrev=12"
    )
    return ", ".join([release, *([f"commit {commit}"] if commit else []), str(Path(__file__).parents[1])])


def _glibc() -> str:
    return " ".join(platform.libc_ver()) or "unknown libc"


def _gpus() -> list[str]:
    """Return one line per GPU."""
    names = GPU.split(",")
    rows = [row.split(", ") for row in _asked("nvidia-smi", f"--query-gpu={GPU}", "--format=csv,noheader").splitlines()]
    return [", ".join(f"{name} {cell}" for name, cell in zip(names, row, strict=False)) for row in rows]


def _asked(*command: str) -> str:
    """Return the output of a program, or "" if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _memory(text: str) -> str:
    """Return free and total memory from the text of /proc/meminfo."""
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()}
    return f"{kilobytes['MemAvailable'] / 2**20:.1f} of {kilobytes['MemTotal'] / 2**20:.1f} GiB free"


def _disk(path: Path) -> str:
    if not path.is_dir():
        return "none"
    usage = shutil.disk_usage(path)
    return f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free"


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    for name, value in report.items():
        if isinstance(value, str):
            yield f"{name}: {value}"
            continue
        yield f"{name}:" + ("" if value else " none")
        yield from (
            (f"  {key} {text}" for key, text in value.items())
            if isinstance(value, dict)
            else (f"  {text}" for text in value)
        )
