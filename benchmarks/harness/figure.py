"""Measured figures, their targets and their records."""

import dataclasses
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from math import isfinite
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Target:
    """A required `floor` and an optional `goal`, for the value itself or for its ratio to the peer."""

    of: Literal["ratio", "value"]
    rule: Literal["at least", "at most", "exactly"]
    floor: float
    goal: float | None = None

    def passes(self, value: float) -> bool:
        """Return whether the value reaches the floor; NaN never does."""
        return self._reaches(value, self.floor)

    def meets_goal(self, value: float) -> bool:
        """Return whether the value reaches the goal, or the floor if there is no goal."""
        return self.passes(value) if self.goal is None else self._reaches(value, self.goal)

    def _reaches(self, value: float, bound: float) -> bool:
        return {"at least": value >= bound, "at most": value <= bound, "exactly": value == bound}[self.rule]


def at_least(floor: float, *, goal: float | None = None) -> Target:
    """Require the value to be at least this large."""
    return Target(of="value", rule="at least", floor=floor, goal=goal)


def at_most(floor: float, *, goal: float | None = None) -> Target:
    """Require the value to be at most this large."""
    return Target(of="value", rule="at most", floor=floor, goal=goal)


def exactly(floor: float) -> Target:
    """Require exactly this value."""
    return Target(of="value", rule="exactly", floor=floor)


def ratio_at_least(floor: float, *, goal: float | None = None) -> Target:
    """Require the value to be this many times better than the peer's."""
    return Target(of="ratio", rule="at least", floor=floor, goal=goal)


@dataclass(frozen=True)
class Peer:
    """The reference of a figure, with its value of the same metric."""

    name: str
    value: float


@dataclass(frozen=True)
class Figure:
    """One metric for one config; `spread` has, for each side, how far the median lies above the fastest sample."""

    metric: str
    value: float
    unit: str
    _: KW_ONLY
    config: Mapping[str, object]
    n: int = 1
    better: Literal["lower", "higher"] = "lower"
    spread: Mapping[str, float] = field(default_factory=dict)
    peer: Peer | None = None
    target: Target | None = None

    def __post_init__(self) -> None:
        assert self.target is None or self.target.of == "value" or self.peer is not None

    @property
    def ratio(self) -> float | None:
        """Return the ratio to the peer; 2.0 is half the time, half the bytes or twice the throughput."""
        if self.peer is None:
            return None
        over, under = (self.peer.value, self.value) if self.better == "lower" else (self.value, self.peer.value)
        return over / under if under else float("inf")

    @property
    def passed(self) -> bool | None:
        """Return whether the floor is reached; None for a figure without a target."""
        return None if self.target is None else self.target.passes(self._judged())

    @property
    def met_goal(self) -> bool | None:
        """Return whether the goal is reached; None for a figure without a target."""
        return None if self.target is None else self.target.meets_goal(self._judged())

    def _judged(self) -> float:
        assert self.target is not None
        value = self.value if self.target.of == "value" else self.ratio
        assert value is not None
        return value

    def line(self) -> str:
        """Return the figure as one line for people."""
        words = [f"{self.metric}: {self.value:,.4g} {self.unit}{_percent(self.spread.get('ours'))}"]
        if self.peer is not None:
            words.append(f"{self.peer.name}: {self.peer.value:,.4g} {self.unit}{_percent(self.spread.get('peer'))}")
            words.append(f"{self.ratio:.2f}x")
        if self.target is not None:
            goal = "" if self.target.goal is None else f", goal {self.target.goal:g}"
            verdict = "goal met" if self.met_goal else "floor passed" if self.passed else "FLOOR MISSED"
            words.append(f"{self.target.of} {self.target.rule} {self.target.floor:g}{goal}: {verdict}")
        return " | ".join(words)

    def record(self, *, name: str, surroundings: Mapping[str, object]) -> dict[str, object]:
        """Return the figure as a JSON object; `surroundings` are commit, versions and machine."""
        return {
            "name": name,
            **surroundings,
            "config": dict(self.config),
            "metric": self.metric,
            "value": self.value,
            "unit": self.unit,
            "n": self.n,
            "spread": dict(self.spread),
            "peer": None if self.peer is None else self.peer.name,
            "peer_value": None if self.peer is None else self.peer.value,
            "ratio": self.ratio if self.ratio is None or isfinite(self.ratio) else None,  # JSON has no infinity
            "target": None if self.target is None else dataclasses.asdict(self.target),
            "pass": self.passed,
        }


def refusal(*, name: str, surroundings: Mapping[str, object], why: str) -> dict[str, object]:
    """Return the record of a benchmark whose outputs differ: it has no figure and did not pass."""
    nothing = Figure("refused", 0.0, "", config={"refused": why})
    return nothing.record(name=name, surroundings=surroundings) | {"value": None, "n": 0, "pass": False}


def _percent(spread: float | None) -> str:
    return "" if spread is None else f" (+{spread:.0%})"
