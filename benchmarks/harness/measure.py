"""Measure moetune against a peer: compare outputs first, then time both in turns, in one process."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.harness.figure import Figure, Peer, Target, exactly


class OutputsDiffer(ValueError):
    """The outputs of ours and the peer differ, so that comparing their speed is meaningless."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two sides; `run` does the timed work and returns the output to compare."""

    name: str
    run: Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Race:
    """Seconds of every round, for ours and the peer."""

    peer: str
    ours_s: tuple[float, ...]
    peer_s: tuple[float, ...]
    statistic: Literal["min", "median"]

    def figure(self, metric: str, *, config: Mapping[str, object], target: Target | None = None) -> Figure:
        """Return our milliseconds with the peer's; the ratio is how many times faster ours is."""
        pick = min if self.statistic == "min" else statistics.median
        return Figure(
            metric,
            1e3 * pick(self.ours_s),
            "ms",
            config={**config, "statistic": self.statistic},
            n=len(self.ours_s),
            spread={"ours": spread(self.ours_s), "peer": spread(self.peer_s)},
            peer=Peer(self.peer, 1e3 * pick(self.peer_s)),
            target=target,
        )


def race(
    ours: Side,
    peer: Side,
    *,
    same: Callable[[Any, Any], None],
    rounds: int,
    warmup: int = 1,
    statistic: Literal["min", "median"] = "min",
    synchronise: Callable[[], object] = lambda: None,
) -> Race:
    """Compare the outputs, warm both sides up, then time them in turns, alternating which goes first.

    `same(ours, peer)` raises OutputsDiffer if the sides do not do the same work; then there is no figure.
    `synchronise` waits for the device if the work is asynchronous.
    """
    assert rounds >= 1
    same(ours.run(), peer.run())
    ours_s, peer_s = take_turns([ours, peer], rounds=rounds, warmup=warmup, synchronise=synchronise)
    return Race(peer=peer.name, ours_s=ours_s, peer_s=peer_s, statistic=statistic)


def take_turns(
    sides: Sequence[Side], *, rounds: int, warmup: int = 1, synchronise: Callable[[], object] = lambda: None
) -> list[tuple[float, ...]]:
    """Return the seconds of every side's rounds; each round runs all sides, in reverse order of the last round."""
    for _ in range(warmup):
        for side in sides:
            side.run()
    samples: list[list[float]] = [[] for _ in sides]
    turns = list(zip(sides, samples, strict=True))
    for _ in range(rounds):
        for side, seconds in turns:
            seconds.append(_seconds(side.run, synchronise))
        turns.reverse()
    return [tuple(seconds) for seconds in samples]


def _seconds(run: Callable[[], Any], synchronise: Callable[[], object]) -> float:
    gc.collect()
    gc.disable()  # a collection during one side's run would count against it
    try:
        synchronise()
        start = time.perf_counter()
        output = run()
        synchronise()
        elapsed = time.perf_counter() - start
    finally:
        gc.enable()
    del output
    return elapsed


def spread(samples: Sequence[float]) -> float:
    """Return how far the median lies above the fastest sample, relative to it: 0 on an otherwise idle machine."""
    return statistics.median(samples) / min(samples) - 1.0


def fastest(
    metric: str,
    samples: Sequence[float],
    unit: str,
    *,
    config: Mapping[str, object],
    peer: tuple[str, Sequence[float]] | None = None,
    target: Target | None = None,
) -> Figure:
    """Return a figure of the fastest round, with the peer's fastest."""
    name, peer_samples = peer or ("", ())
    return Figure(
        metric,
        min(samples),
        unit,
        config=config,
        n=len(samples),
        spread={"ours": spread(samples)} | ({"peer": spread(peer_samples)} if peer else {}),
        peer=Peer(name, min(peer_samples)) if peer else None,
        target=target,
    )


def counted(metric: str, value: int, unit: str, *, expected: int, config: Mapping[str, object]) -> Figure:
    """Return a figure that passes only if the counted value equals the formula's."""
    return Figure(metric, value, unit, config={**config, "expected": expected}, target=exactly(expected))
