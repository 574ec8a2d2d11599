"""`flop-meter`: our FLOP meter's TFLOP/s for published tokens/s, compared with the published TFLOP/s."""

from collections.abc import Iterator

from benchmarks.harness.figure import Figure, at_most
from finetune.architecture.families import family
from finetune.architecture.flops import FlopMeter, Training, Work

LENGTH = 4096
PAIRS = (
    ("NeMo, 30B", "qwen3-vl-30b-a3b", 12_040, 277.0),
    ("ModelZoo, 235B", "qwen3-vl-235b-a22b", 1_862, 276.0),
    ("Megatron-Bridge, 235B on GB300", "qwen3-vl-235b-a22b", 6_131, 907.0),
)
"""Publisher, model, tokens/s per device and TFLOP/s per device, for full tuning on samples of 4,096 tokens."""


def run() -> Iterator[Figure]:
    """Yield the meter's error for each published pair."""
    parts = ("attention", "experts", "router", "norms", "embeddings", "head")
    trains = {part: Training(mode="full") for part in parts}
    for publisher, name, rate, published in PAIRS:
        work = Work(tokens=LENGTH, supervised=LENGTH, squares=LENGTH**2)
        metered = FlopMeter(family(name), trains).model(work) / LENGTH * rate / 1e12
        yield Figure(
            f"error against {publisher}",
            abs(metered / published - 1) * 100,
            "%",
            config={"family": name, "tokens_per_second": rate, "published_tflops": published, "found_tflops": metered},
            target=at_most(1.0),
        )
