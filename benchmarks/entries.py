"""The table of benchmarks. A module is imported when its benchmark runs, so that listing costs nothing."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A benchmark: `module` has `def run() -> Iterator[Figure]`, which compares outputs before it measures."""

    name: str
    suite: Literal["cpu", "gpu"]
    module: str
    about: str


ENTRIES = (
    Entry(
        name="config-check",
        suite="cpu",
        module="benchmarks.config_check",
        about="cold start of `moetune check` beside `import torch`",
    ),
)
