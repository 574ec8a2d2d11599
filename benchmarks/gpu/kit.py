"""`make gpu-kit`: pack everything that a CUDA machine with torch and without a network needs into one folder.

    wheels/       the locked releases of all packages that moetune imports, for the machine's Python
    photographs/  scikit-learn's two photographs, with the text that names their authors and licence
    python        the machine's Python version
    commit        the commit of the tree and a digest of its source, because the machine may have no git

It leaves out torch, which the machine provides; numpy, which comes with torch; and av, which only opens videos.
"""

import os
import shutil
import subprocess
import sys
from importlib.metadata import requires
from importlib.resources import files
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.harness.machine import ROOT, commit, source_digest

PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64")
FROM_SOURCE = ("deepspeed",)
"""Packages without published wheels; built here, they are pure Python."""
ROOTS = ("moetune", "pytest", "hypothesis")
LEFT_OUT = frozenset({"av", "numpy", "torch", "wandb"})
PHOTOGRAPHS = ("china.jpg", "flower.jpg", "README.txt")
LIMIT = 58 * 2**20
"""Largest size of the kit in bytes; upload limits of GPU providers allow little more than this and the tree."""


def main(folder: Path) -> int:
    """Create the folder from scratch; return 1 if it is too large."""
    if folder.exists():
        shutil.rmtree(folder)
    (folder / "wheels").mkdir(parents=True)
    collect(packages(), folder / "wheels")
    (folder / "photographs").mkdir()
    for name in PHOTOGRAPHS:
        (folder / "photographs" / name).write_bytes((files("sklearn.datasets.images") / name).read_bytes())
    (folder / "python").write_text(f"{PYTHON}\n")
    (folder / "commit").write_text(f"{commit(ROOT)}\n{source_digest(ROOT)}\n")
    return weigh(folder)


def weigh(folder: Path) -> int:
    """Print the size and the largest files of the folder; return 1 if it is too large."""
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    print(f"{folder}: {total / 2**20:.1f} of {LIMIT / 2**20:.0f} MiB")
    for path in sorted(sizes, key=lambda path: sizes[path], reverse=True)[:5]:
        print(f"  {sizes[path] / 2**20:5.1f} MiB  {path.name}")
    if total > LIMIT:
        print(f"gpu-kit: {total:,} bytes exceed the limit of {LIMIT:,}: leave out a package", file=sys.stderr)
        return 1
    return 0


def packages() -> list[str]:
    """Return the names of all needed packages, from the installed packages' requirements for the machine's Python."""
    there = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "extra": ""}
    waiting, names = list(ROOTS), set(ROOTS) - {"moetune"}
    while waiting:
        for line in requires(waiting.pop()) or ():
            requirement = Requirement(line)
            name = canonicalize_name(requirement.name)
            if name not in LEFT_OUT | names and (requirement.marker is None or requirement.marker.evaluate(there)):
                names.add(name)
                waiting.append(name)
    return sorted(names)


def collect(names: list[str], into: Path) -> None:
    """Download the locked release of each package for the machine; packages without wheels are built here."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    locked = ["--no-deps", "--constraint", str(ROOT / "constraints.txt")]
    ready = [name for name in names if name not in FROM_SOURCE]
    there = ["--only-binary=:all:", "--python-version", PYTHON, *(f"--platform={name}" for name in PLATFORMS)]
    subprocess.run([*pip, "download", *locked, *there, "--dest", str(into), *ready], check=True)
    built = [name for name in names if name in FROM_SOURCE]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    subprocess.run([*pip, "wheel", *locked, "--wheel-dir", str(into), *built], check=True, env=environment)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
