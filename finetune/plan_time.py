"""How long a step takes: a stated model, not a measurement. Loads no torch.

A micro-batch computes for as long as its operations take at a share of the device's peak, or as reading its weights
takes, whichever is longer, part by part. Rows travel to their experts while nothing else runs. Gathers hide behind the
computing as far as it is long enough; gradients and the update do not hide.
"""

from dataclasses import dataclass, field

from finetune.config import RunConfig
from finetune.families import Family
from finetune.flops import FlopMeter, Work, trainings
from finetune.gpus import Cluster
from finetune.plan_memory import Layout, slices
from finetune.plan_wire import LINK_SHARE, Traffic
from finetune.trained import frozen_tensors, trained_tensors

EFFICIENCY = 0.35
"""Share of the peak that computing reaches. The best published rate for this family is 0.377, recompute counted."""
MEMORY_SHARE = 0.8
"""Of the memory's data-sheet rate."""
PATCHES_PER_IMAGE = 4096
"""An image of 1,024 tokens: what tower attention is counted with."""
UPDATE_BYTES = 34
"""Read and written for one trained element: master, two moments and gradient in float32, the weight itself."""


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What the data will be like, and how well the machine does; every one can be set on the command line."""

    sample_tokens: int = 2048
    vision_share: float = 0.5
    supervised_share: float = 0.3
    efficiency: float = EFFICIENCY
    skew: float = 1.5

    def sentences(self) -> list[str]:
        """The assumptions as they are printed."""
        return [
            f"samples of {self.sample_tokens:,} tokens; {self.vision_share:.0%} of them from images; "
            f"{self.supervised_share:.0%} supervised; rows are full",
            f"the busiest rank's experts get {self.skew:g} x the mean of the rows (with ep > 1)",
            f"computing reaches {self.efficiency:.0%} of the peak, memory {MEMORY_SHARE:.0%} and links {LINK_SHARE:.0%} "
            f"of their data sheets",
            "rows to experts and gradients are not overlapped, gathers are; reading data takes no time",
        ]


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of one step by what they go to, and what they amount to."""

    seconds: dict[str, float] = field(default_factory=dict)
    model_flops: float
    """Of one step, on one rank."""
    hardware_flops: float
    flops_per_token: float
    tokens_per_second: float
    """Of one rank."""
    mfu: float

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


def work(config: RunConfig, base: Family, layout: Layout, assumed: Assumed) -> Work:
    """One rank's part of one packed row."""
    tokens = config.data.tokens_per_pack // layout.sp
    vision = min(tokens * assumed.vision_share, (config.data.vision_tokens_per_pack or tokens) / layout.sp)
    patches = int(vision) * base.vision.spatial_merge_size**2
    return Work(
        tokens=tokens,
        supervised=int(tokens * assumed.supervised_share),
        squares=tokens * min(assumed.sample_tokens, config.data.tokens_per_pack),
        patches=patches,
        frame_squares=patches * min(PATCHES_PER_IMAGE, patches),
    )


def step_time(
    config: RunConfig,
    base: Family,
    layout: Layout,
    cluster: Cluster,
    traffic: list[Traffic],
    *,
    micro_batches: int,
    assumed: Assumed,
) -> Time:
    """The model's seconds for one step of the slowest rank."""
    meter = FlopMeter(base, trainings(config.adapters), recompute=layout.recompute)  # type: ignore[arg-type]
    row = work(config, base, layout, assumed)
    parts = meter.count(row)
    skew = assumed.skew if layout.ep > 1 else 1.0
    rate = cluster.gpu.flops * assumed.efficiency
    reading = _reading(config, base, layout) / (MEMORY_SHARE * cluster.gpu.memory_rate)
    seconds = {"experts": 0.0, "rest of the model": 0.0}
    for part, flops in parts.items():
        here = (flops.model + flops.again) / rate
        if part == "experts":
            seconds["experts"] += max(here * skew, reading)
        else:
            seconds["rest of the model"] += here
    seconds = {name: micro_batches * value for name, value in seconds.items()}
    computing = sum(seconds.values())
    by_kind: dict[str, float] = {}
    for one in traffic:
        kind = one.kind.partition(",")[0]
        by_kind[kind] = by_kind.get(kind, 0.0) + one.seconds(cluster)
    gathers = sum(by_kind.pop(kind, 0.0) for kind in ("trained weights", "frozen weights"))
    seconds |= {**by_kind, "gathers that do not hide": max(0.0, gathers - computing)}
    trained = trained_tensors(base, config.adapters, ep=layout.ep)
    seconds["update"] = UPDATE_BYTES * slices(trained, layout) / (MEMORY_SHARE * cluster.gpu.memory_rate)
    seconds = {name: value for name, value in seconds.items() if value}
    model = micro_batches * sum(part.model for part in parts.values())
    step, tokens = sum(seconds.values()), micro_batches * row.tokens
    return Time(
        seconds=seconds,
        model_flops=model,
        hardware_flops=micro_batches * sum(part.model + part.again for part in parts.values()),
        flops_per_token=model / tokens,
        tokens_per_second=tokens / step,
        mfu=model / step / cluster.gpu.flops,
    )


def _reading(config: RunConfig, base: Family, layout: Layout) -> float:
    """Bytes of expert weights that a micro-batch reads: forward, backward, and again where they are recomputed."""
    tensors = frozen_tensors(base, config.adapters, ep=layout.ep) + trained_tensors(base, config.adapters, ep=layout.ep)
    passes = 3 if layout.recompute == "layer" else 2
    return passes * layout.itemsize * sum(tensor.elements for tensor in tensors if tensor.expert)
