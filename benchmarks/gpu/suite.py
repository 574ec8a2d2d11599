"""Run the tests marked `gpu` with pytest."""

import re
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.gpu.parts import Skipped
from benchmarks.gpu.sizes import Sizes
from benchmarks.harness.figure import Figure, at_least
from benchmarks.harness.machine import ROOT

MARK = "@pytest.mark.gpu"


def run(sizes: Sizes) -> Iterator[Figure]:
    """Yield how many passed; only files with such tests are loaded, as others import packages that the kit lacks."""
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if MARK in path.read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run([*command, *map(str, files)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)}
    if done.returncode:
        raise RuntimeError(f"pytest -m gpu ended with {done.returncode}: {counts or done.stdout[-300:]}")
    if not counts.get("passed"):
        raise Skipped(f"the tests marked gpu need a CUDA device; skipped: {counts.get('skipped', 0)}")
    yield Figure(
        "tests marked gpu that pass", counts["passed"], "tests", config=counts, better="higher", target=at_least(1)
    )
