"""Parts of a GPU kit with every possible outcome; each runs in its own process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.gpu.parts import Skipped
from benchmarks.gpu.sizes import Sizes
from benchmarks.harness.figure import Figure, at_least


def figure(value: float, floor: float = 1.0) -> Figure:
    target = at_least(floor)
    return Figure(f"value {value:g}", value, "things", config={"who": "a test"}, target=target)


def passes(sizes: Sizes) -> Iterator[Figure]:
    assert sizes.world == 2
    yield figure(2.0)


def fails(sizes: Sizes) -> Iterator[Figure]:
    yield figure(3.0)
    raise ValueError("what it found is wrong")


def misses(sizes: Sizes) -> Iterator[Figure]:
    yield figure(0.5)


def hangs(sizes: Sizes) -> Iterator[Figure]:
    yield figure(4.0)
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    sys.stdout.write(f"rank {rank.pid}\n")
    time.sleep(1000)


def killed(sizes: Sizes) -> Iterator[Figure]:
    yield figure(5.0)
    os.kill(os.getpid(), signal.SIGKILL)


def leaves_a_rank(sizes: Sizes) -> Iterator[Figure]:
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    sys.stdout.write(f"rank {rank.pid}\n")
    yield figure(6.0)


def skips(sizes: Sizes) -> Iterator[Figure]:
    raise Skipped("one GPU: two are needed")
    yield figure(1.0)
