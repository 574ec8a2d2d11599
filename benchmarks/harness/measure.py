"""Measuring ours beside a peer: outputs first, then both in turns, in one process."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.harness.figure import Figure, Peer, Target, exactly


class OutputsDiffer(ValueError):
    """Ours and the peer's outputs are not the same; there is nothing to compare the speed of."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two; `run` does the timed work and returns the output that is compared."""

    name: str
    run: Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Race:
    """Seconds of every round, ours and the peer's."""

    peer: str
    ours_s: tuple[float, ...]
    peer_s: tuple[float, ...]
    statistic: Literal["min", "median"]

    def figure(self, metric: str, *, config: Mapping[str, object], target: Target | None = None) -> Figure:
        """Return milliseconds beside the peer's; the ratio is how many times faster ours is."""
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
    """Compare the outputs, warm both up, then time them in turns; the one that goes first alternates.

    `same(ours, peer)` raises OutputsDiffer: no figure comes out of two sides that do not do the same work.
    `synchronise` waits for the device, where the work is asynchronous.
    """
    assert rounds >= 1
    same(ours.run(), peer.run())
    ours_s, peer_s = take_turns([ours, peer], rounds=rounds, warmup=warmup, synchronise=synchronise)
    return Race(peer=peer.name, ours_s=ours_s, peer_s=peer_s, statistic=statistic)


def take_turns(
    sides: Sequence[Side], *, rounds: int, warmup: int = 1, synchronise: Callable[[], object] = lambda: None
) -> list[tuple[float, ...]]:
    """Return the seconds of every side's rounds; each round runs all, in the other order than the round before."""
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
    gc.disable()  # a collection in the middle of one side would count against it
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
    """Return how far the median lies above the fastest, as a share of it: 0 on a machine that does nothing else."""
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
    """Return the best of some rounds, beside the best of the peer's."""
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
    """Return a figure that passes only when what was counted is what the formula says."""
    return Figure(metric, value, unit, config={**config, "expected": expected}, target=exactly(expected))
