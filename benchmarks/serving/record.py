"""The results of a proof: the cells of the matrix, the file that keeps them, the table that shows them."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.serving.cases import Outcome

CONTROL = "control of: "
RESULTS = Path(__file__).parents[1] / "results" / "served.json"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One server and one case. `reason`: what was counted, or what it was refused with."""

    server: str
    version: str
    case: str
    outcome: Outcome
    expected: Outcome
    reason: str = ""

    @property
    def is_control(self) -> bool:
        """Say whether this is a comparison that must fail."""
        return self.case.startswith(CONTROL)

    @property
    def tokens(self) -> int:
        """Return how many tokens were found equal."""
        found = re.search(r"(\d+) tokens equal", self.reason)
        return int(found[1]) if found else 0

    def line(self) -> str:
        """Return the row of the printed table."""
        mark = "ok  " if self.outcome == self.expected else "FAIL"
        return f"{mark}  {self.server:<12}  {self.outcome:<8}  {self.case}: {self.reason}"


def read_cells(path: Path = RESULTS) -> list[Cell]:
    """Return what is recorded."""
    return [Cell(**entry) for entry in json.loads(path.read_text())] if path.is_file() else []


def keep_cells(cells: Sequence[Cell], path: Path = RESULTS, *, others: bool = True) -> None:
    """Write new cells over those of the same server and case; `others` says whether to keep the rest of the file."""
    known = {(cell.server, cell.case): cell for cell in [*(read_cells(path) if others else []), *cells]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(cell) for cell in known.values()], indent=1) + "\n")
