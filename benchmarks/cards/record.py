"""The numbers of the cards: the file that keeps them, and the tables of docs/cards.md."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "cards.json"
PARTS = ("attention", "experts", "both")
"""The parts that a LoRA adapts."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One adapter: the score on its task before and after, and on the base's letters before and after."""

    task: str
    parts: str
    seed: int
    metric: str
    about: str
    before: float
    after: float
    kept_before: float
    kept_after: float
    trained: int
    """Parameters that trained."""
    steps: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Base:
    """One base, by the switch that was changed: scores by kind of question, and the load of its experts at the end."""

    switch: str
    seed: int
    scores: dict[str, float]
    dead: float
    """Dead experts over all layers, mean over the last steps."""
    busiest: float
    """Load of the busiest expert over the mean, in the worst layer, mean over the last steps."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Everything that is recorded."""

    cards: list[Card]
    bases: list[Base]


def read_numbers(path: Path = RESULTS) -> Numbers:
    """Return what is recorded; nothing without a file."""
    content = json.loads(path.read_text()) if path.is_file() else {"cards": [], "bases": []}
    return Numbers(cards=[Card(**one) for one in content["cards"]], bases=[Base(**one) for one in content["bases"]])


def keep_numbers(numbers: Numbers, path: Path = RESULTS) -> None:
    """Write everything that is recorded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(numbers), indent=1) + "\n")


def card_rows(cards: Sequence[Card]) -> list[list[str]]:
    """Return a row for each task: its score before, then after each LoRA, by seed."""
    rows = []
    for task in dict.fromkeys(card.task for card in cards):
        of_task = [card for card in cards if card.task == task]
        before = {card.seed: card.before for card in of_task}
        cells = [_spread([card.after for card in of_task if card.parts == parts]) for parts in PARTS]
        rows.append(
            [
                f"{task}: {of_task[0].about}",
                f"`{of_task[0].metric}`",
                str(len(before)),
                _spread([*before.values()]),
                *cells,
            ]
        )
    return rows


def kept_rows(cards: Sequence[Card]) -> list[list[str]]:
    """Return a row for each task: the base's letters before, then after each LoRA."""
    rows = []
    for task in dict.fromkeys(card.task for card in cards):
        of_task = [card for card in cards if card.task == task]
        before = {card.seed: card.kept_before for card in of_task}
        cells = [_spread([card.kept_after for card in of_task if card.parts == parts]) for parts in PARTS]
        rows.append([task, _spread([*before.values()]), *cells])
    return rows


def base_rows(bases: Sequence[Base]) -> list[list[str]]:
    """Return a row for each switch: seeds, dead experts, the busiest one, and the scores."""
    rows = []
    for switch in dict.fromkeys(base.switch for base in bases):
        alike = [base for base in bases if base.switch == switch]
        scores = [_spread([base.scores[name] for base in alike]) for name in alike[0].scores]
        load = [_spread([base.dead for base in alike]), _spread([base.busiest for base in alike])]
        rows.append([f"`{switch}`", str(len(alike)), *load, *scores])
    return rows


def gain(cards: Sequence[Card], task: str) -> tuple[float, float] | None:
    """Return what experts and both score above attention alone on a task, mean over the seeds that have all three."""
    found = {(card.parts, card.seed): card.after for card in cards if card.task == task}
    seeds = [seed for parts, seed in found if parts == "attention" and all((other, seed) in found for other in PARTS)]
    if not seeds:
        return None
    experts, both = (
        statistics.fmean(found[parts, seed] - found["attention", seed] for seed in seeds) for parts in PARTS[1:]
    )
    return experts, both


def gain_lines(cards: Sequence[Card], *, least: float = 0.05) -> list[str]:
    """Return a sentence for each task: what adapting experts gains over attention alone, or that it gains nothing."""
    lines = []
    for task in dict.fromkeys(card.task for card in cards):
        found = gain(cards, task)
        if found is None:
            continue
        best = max(found)
        words = f"gains {best:.2f}" if best >= least else f"gains nothing (the difference is {best:+.2f})"
        lines.append(f"- {task}: adapting experts, alone or with attention, {words}.")
    return lines or ["No task has been trained with all three yet."]


def _spread(values: Sequence[float]) -> str:
    """Return the mean, with the least and the most if there are several."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"
