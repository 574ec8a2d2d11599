"""`needle`: a small model trained at 4,096 tokens, rows over two ranks, finds needles; beyond, by YaRN and without."""

from collections.abc import Iterator

from benchmarks.harness.figure import Figure, Target
from benchmarks.long_rows.needle_ranks import DEPTHS, NATIVE, Course, Score, train_and_probe

FACTOR = 3.0
COURSE = Course(sp=2)


def run() -> Iterator[Figure]:
    """Yield the share of needles found within the native window, and at three times its length."""
    far = int(NATIVE * FACTOR)
    near, plain, stretched = train_and_probe(COURSE, [(NATIVE, 1.0), (far, 1.0), (far, FACTOR)])
    yield _figure(near, "found within the native window", floor=0.8)
    yield Figure(
        metric=f"found at {far:,} tokens with YaRN x {FACTOR:g}", value=stretched.mean, unit="share", better="higher",
        config=_config(stretched) | {"plain": list(plain.found)}, peer="the same weights without YaRN",
        peer_value=plain.mean, target=Target(of="ratio", rule="at least", floor=1.05),
    )  # fmt: skip


def _figure(score: Score, metric: str, *, floor: float) -> Figure:
    return Figure(
        metric=f"{metric}, {score.length:,} tokens", value=score.mean, unit="share", better="higher",
        config=_config(score), target=Target(of="value", rule="at least", floor=floor),
    )  # fmt: skip


def _config(score: Score) -> dict[str, object]:
    by_depth = {f"{depth:.0%}": found for depth, found in zip(DEPTHS, score.found, strict=True)}
    return {"sp": COURSE.sp, "stages": list(COURSE.stages), "trials_a_depth": COURSE.trials, "by_depth": by_depth}
