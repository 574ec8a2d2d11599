"""The numbers of `python -m benchmarks.probes`: the file that keeps them, and the table that shows them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "probes.json"
LEAST = 0.3
"""The smallest difference that counts as detected, for every seed."""


@dataclass(frozen=True, kw_only=True)
class Detection:
    """One probe of one trained model: the mean score with the mechanism and without it."""

    probe: str
    seed: int
    about: str
    columns: tuple[str, str]
    having: float
    lacking: float
    seconds: float
    """Time of the training, on one core that may be shared."""
    scores: list[dict[str, object]]
    """All scores of the probe."""

    @property
    def difference(self) -> float:
        """Return the part of the score that the mechanism gives."""
        return self.having - self.lacking


@dataclass(frozen=True, kw_only=True)
class DeadExpert:
    """One model whose router gives one expert a logit of minus infinity, and the experts that `balance` names."""

    seed: int
    layer: int
    expert: int
    before: list[list[int]]
    named: list[list[int]]
    """Dead experts by layer, in the untouched model and after."""

    @property
    def exactly(self) -> bool:
        """Return whether only that expert is named, and none before."""
        return not any(self.before) and self.named == [
            [self.expert] if at == self.layer else [] for at in range(len(self.named))
        ]


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Everything that is recorded."""

    detections: list[Detection]
    dead: list[DeadExpert]


def read_numbers(path: Path = RESULTS) -> Numbers:
    """Return what is recorded; nothing without a file."""
    content = json.loads(path.read_text()) if path.is_file() else {"detections": [], "dead": []}
    return Numbers(
        detections=[Detection(**entry | {"columns": tuple(entry["columns"])}) for entry in content["detections"]],
        dead=[DeadExpert(**entry) for entry in content["dead"]],
    )


def keep_numbers(numbers: Numbers, path: Path = RESULTS) -> None:
    """Write everything that is recorded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(numbers), indent=1) + "\n")


def detection_rows(numbers: Numbers) -> list[list[str]]:
    """Return a row for each probe: its training, its seeds, the scores with and without, the smallest difference."""
    rows = []
    for probe in dict.fromkeys(found.probe for found in numbers.detections):
        of_probe = sorted((found for found in numbers.detections if found.probe == probe), key=lambda found: found.seed)
        first = of_probe[0]
        having, lacking = (
            " / ".join(f"{getattr(one, name):.2f}" for one in of_probe) for name in ("having", "lacking")
        )
        rows.append(
            [
                f"`{probe}`",
                first.about,
                ", ".join(str(one.seed) for one in of_probe),
                f"{first.columns[0]}: {having}",
                f"{first.columns[1].rpartition(', ')[2]}: {lacking}",
                f"{min(one.difference for one in of_probe):.2f}",
            ]
        )
    return rows


def dead_rows(experts: Sequence[DeadExpert]) -> list[list[str]]:
    """Return a row for each model with a closed expert."""
    return [
        [
            str(one.seed),
            f"layer {one.layer}, expert {one.expert}",
            "; ".join(
                f"layer {at}, expert {', '.join(map(str, found))}" for at, found in enumerate(one.named) if found
            ),
        ]
        for one in experts
    ]
