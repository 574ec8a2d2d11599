"""How long a step takes: a stated model, not a measurement. Loads no torch.

A micro-batch computes for as long as its operations take at a share of the device's peak, or as reading its weights
takes, whichever is longer, part by part. Rows travel to their experts while nothing else runs. Gathers hide behind
most of the computing; gradients and the update do not hide.
"""

from dataclasses import dataclass, field
from functools import cache
from math import log2

from finetune.config import AdaptersConfig, RunConfig
from finetune.families import Family
from finetune.flops import FlopMeter, Work, trainings
from finetune.gpus import Cluster
from finetune.plan_activations import Recompute
from finetune.plan_layout import Layout, slices
from finetune.plan_wire import LINK_SHARE, Traffic
from finetune.trained import frozen_tensors, trained_tensors

EFFICIENCY = 0.35
"""Share of the peak that computing reaches. The best published rate for this family is 0.377, recompute counted."""
MEMORY_SHARE = 0.8
"""Of the memory's data-sheet rate."""
HIDING = 0.5
"""Of the computing, what can hide gathers: at both ends of a pass nothing does."""
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

    def skew_of(self, ep: int) -> float:
        """Rows of a group's busiest rank over the mean: `skew` for eight, 1 for one, by the logarithm between."""
        return 1 + (self.skew - 1) * log2(ep) / 3

    def sentences(self) -> list[str]:
        """The assumptions as they are printed."""
        return [
            f"samples of {self.sample_tokens:,} tokens; {self.vision_share:.0%} of them from images; "
            f"{self.supervised_share:.0%} supervised; rows are full",
            f"the busiest of eight ranks' experts gets {self.skew:g} x the mean of the rows; the excess grows with "
            f"the logarithm of ep",
            f"computing reaches {self.efficiency:.0%} of the peak, memory {MEMORY_SHARE:.0%} and links "
            f"{LINK_SHARE:.0%} of their data sheets",
            f"rows to experts and gradients are not overlapped, gathers hide behind {HIDING:.0%} of the computing; "
            f"reading data takes no time",
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
    meter = _meter(base, config.adapters, layout.recompute)
    row = work(config, base, layout, assumed)
    parts = meter.count(row)
    rate = cluster.gpu.flops * assumed.efficiency
    reading = _reading(config, base, layout) / (MEMORY_SHARE * cluster.gpu.memory_rate)
    seconds = {"experts": 0.0, "rest of the model": 0.0}
    for part, flops in parts.items():
        here = (flops.model + flops.again) / rate
        if part == "experts":
            seconds["experts"] += max(here * layout.skew, reading)
        else:
            seconds["rest of the model"] += here
    seconds = {name: micro_batches * value for name, value in seconds.items()}
    computing = sum(seconds.values())
    by_kind: dict[str, float] = {}
    for one in traffic:
        kind = one.kind.partition(",")[0]
        by_kind[kind] = by_kind.get(kind, 0.0) + one.seconds(cluster)
    gathers = sum(by_kind.pop(kind, 0.0) for kind in ("trained weights", "frozen weights"))
    seconds |= {**by_kind, "gathers that do not hide": max(0.0, gathers - HIDING * computing)}
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


@cache
def _meter(base: Family, adapters: AdaptersConfig, recompute: Recompute) -> FlopMeter:
    return FlopMeter(base, trainings(adapters), recompute=recompute)


def _reading(config: RunConfig, base: Family, layout: Layout) -> float:
    """Bytes of expert weights that a micro-batch reads: forward, backward, and again where they are recomputed."""
    tensors = frozen_tensors(base, config.adapters, ep=layout.ep) + trained_tensors(base, config.adapters, ep=layout.ep)
    passes = 3 if layout.recompute == "layer" else 2
    return passes * layout.itemsize * sum(tensor.elements for tensor in tensors if tensor.expert)
