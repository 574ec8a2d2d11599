"""`needle`: needles found by a small model trained at 4,096 tokens over two ranks, and farther out with YaRN."""

from collections.abc import Iterator

from benchmarks.harness.figure import Figure, Peer, at_least, ratio_at_least
from benchmarks.long_rows.needle_ranks import DEPTHS, NATIVE, Course, Score, train_and_probe

FACTOR = 3.0
COURSE = Course(sp=2)


def run() -> Iterator[Figure]:
    """Yield the share of needles found within the native window, and at three times its length."""
    far = int(NATIVE * FACTOR)
    near, plain, stretched = train_and_probe(COURSE, [(NATIVE, 1.0), (far, 1.0), (far, FACTOR)])
    yield _figure(near, "found within the native window", floor=0.8)
    yield Figure(
        f"found at {far:,} tokens with YaRN x {FACTOR:g}",
        stretched.mean,
        "share",
        config=_config(stretched) | {"plain": list(plain.shares)},
        better="higher",
        peer=Peer("the same weights without YaRN", plain.mean),
        target=ratio_at_least(1.05),
    )


def _figure(score: Score, metric: str, *, floor: float) -> Figure:
    return Figure(
        f"{metric}, {score.length:,} tokens",
        score.mean,
        "share",
        config=_config(score),
        better="higher",
        target=at_least(floor),
    )


def _config(score: Score) -> dict[str, object]:
    by_depth = {f"{depth:.0%}": share for depth, share in zip(DEPTHS, score.shares, strict=True)}
    return {"sp": COURSE.sp, "stages": list(COURSE.stages), "trials_a_depth": COURSE.trials, "by_depth": by_depth}
