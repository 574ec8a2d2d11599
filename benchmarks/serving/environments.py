"""Installs each server into a virtual environment of its own, from a pinned list, and patches only that environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path

LISTS = Path(__file__).parent / "servers"
VLLM = "0.32.0"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A virtual environment with one server in it."""

    name: str
    folder: Path

    @property
    def python(self) -> Path:
        """Return its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        """Return where its packages lie."""
        return Path(sysconfig.get_path("purelib", vars={"base": str(self.folder)}))

    def version(self, package: str) -> str:
        """Return the version of a package that is installed there."""
        (found,) = self.packages.glob(f"{package.replace('-', '_')}-*.dist-info")
        return found.name.removesuffix(".dist-info").split("-")[1]

    def variables(self) -> dict[str, str]:
        """Return the variables under which its commands run: two cores, no network, nothing of ours."""
        ours = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return ours | {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "2",
            "HF_HUB_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }


def installed(name: str, servers: Path) -> Environment:
    """Return the environment of a server; install it unless it holds what its list says."""
    environment, listed = Environment(name=name, folder=servers.resolve() / name), LISTS / f"{name}.txt"
    stamp = environment.folder / "installed.txt"
    if stamp.is_file() and stamp.read_text() == listed.read_text():
        return environment
    shutil.rmtree(environment.folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", environment.folder], check=True)
    pip = [str(environment.python), "-m", "pip", "install", "-qq", "--no-deps"]
    torch = next((line for line in listed.read_text().splitlines() if line.startswith("torch==")), None)
    index = os.environ.get("TORCH_INDEX")  # as in the Makefile: an index with CPU builds of torch
    if index and torch:
        subprocess.run([*pip, "--index-url", index, torch], check=True)
    subprocess.run([*pip, "--requirement", str(listed)], check=True)
    if (environment.packages / "torchvision").is_dir():
        let_torchvision_be_imported(environment.packages)
    if name == "vllm":
        name_the_build(environment.packages)
    if name == "llama.cpp":
        unpack_source(environment, "llama-cpp-python")
    shutil.copy(listed, stamp)
    return environment


def unpack_source(environment: Environment, package: str) -> None:
    """Put the source of an installed package into the environment's folder `source`: wheels have no scripts."""
    folder = environment.folder / "source"
    release = f"{package}=={environment.version(package)}"
    run_in(environment, "-m", "pip", "download", "-qq", "--no-deps", "--no-binary", package, release, "-d", str(folder))
    (packed,) = folder.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")


def run_in(environment: Environment, *words: str) -> None:
    """Run a command of an environment's Python; its output is shown only if it fails."""
    done = subprocess.run(
        [environment.python, *words], env=environment.variables(), capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        said = (done.stdout + done.stderr)[-3000:]
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode} in {environment.folder}:\n{said}")


def why_not(name: str) -> str:
    """Return why pip cannot install a server's list here, "" if it can; nothing is installed."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-qq"]
    done = subprocess.run([*pip, "--requirement", f"{name}.txt"], cwd=LISTS, capture_output=True, text=True)
    errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    return (errors or ["pip failed and printed no error"])[0] if done.returncode else ""


def let_torchvision_be_imported(packages: Path) -> None:
    """Take out what registers operators of torchvision's CUDA build: beside a CPU torch they do not exist.

    Image processors need its Python code only.
    """
    file = packages / "torchvision" / "_meta_registrations.py"
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("@torch.library.register_fake(")]
    file.write_text("".join(kept))


def name_the_build(packages: Path) -> None:
    """Describe `vllm-cpu` a second time as `vllm`, with cpu in its version: vLLM asks for both at its start."""
    source, target = packages / f"vllm_cpu-{VLLM}.dist-info", packages / f"vllm-{VLLM}+cpu.dist-info"
    shutil.copytree(source, target)
    metadata = (target / "METADATA").read_text()
    metadata = metadata.replace("Name: vllm-cpu\n", "Name: vllm\n", 1)
    metadata = metadata.replace(f"Version: {VLLM}\n", f"Version: {VLLM}+cpu\n", 1)
    (target / "METADATA").write_text(metadata)
    (target / "RECORD").unlink()  # the files belong to the first description
