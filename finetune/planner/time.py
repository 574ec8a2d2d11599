"""Estimates the time of a step by a model, not by a measurement. Loads no torch.

The device runs the operations of a micro-batch one after the other; `finetune.planner.operations` gives the time of
each. Rows travel to their experts while nothing else runs. Gathers overlap with most of the work; gradients and the
update do not. Meanwhile the host launches the operations; if that takes longer in total, the device waits for the host.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from math import log2

from finetune.architecture.families import Family
from finetune.architecture.flops import FlopMeter, Work, trainings
from finetune.architecture.trained import Tensor, frozen_tensors, trained_tensors
from finetune.config import AdaptersConfig, RunConfig
from finetune.planner.activations import Reach, Recompute, Rows
from finetune.planner.gpus import MEMORY_SHARE, Cluster
from finetune.planner.layer import around, decoder_layer, head
from finetune.planner.operations import Op, spent
from finetune.planner.rank_layout import RankLayout, slices
from finetune.planner.tower import tower
from finetune.planner.wire import LINK_SHARE, Traffic

LAUNCH_US = 12.0
"""Microseconds of the host per operation, with its share of Python. 8 were measured on an idle CPU: 23 and 34 ms for
about 3,000 and 4,000 operations, a micro-batch of 12 layers, without recompute and with it. Half as much again allows
for a slower CPU."""
HOOK = 0.17e-3
"""Seconds of the host per pass of a module whose weights are gathered, as measured for the engine's hooks."""
WAITING = "waiting for the host"
HIDING = 0.5
"""Share of the device's work that gathers can overlap with: at both ends of a pass they cannot."""
UPDATE_BYTES = 34
"""Bytes that the update reads and writes per trained element: float32 master, two moments and gradient, weight."""
GRADIENT_BYTES = 24
"""Bytes moved per gradient element and micro-batch: copied to the bucket, scaled and added up, all in float32."""


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """Assumptions about the data and the host; each value can be set on the command line."""

    sample_tokens: int = 2048
    image_tokens: int = 1024
    vision_share: float = 0.5
    supervised_share: float = 0.3
    launch_us: float = LAUNCH_US
    skew: float = 1.5

    def skew_of(self, ep: int) -> float:
        """Return the rows of the busiest of ep ranks over the mean: `skew` for 8, 1 for 1, logarithmic in ep."""
        return 1 + (self.skew - 1) * log2(ep) / 3

    def sentences(self) -> list[str]:
        """Return the assumptions as they are printed."""
        return [
            f"samples of {self.sample_tokens:,} tokens; {self.vision_share:.0%} of them from images of "
            f"{self.image_tokens:,}; {self.supervised_share:.0%} supervised; rows are full",
            f"of eight ranks, the busiest gets {self.skew:g} x the mean of the experts' rows; the excess grows with "
            f"the logarithm of ep",
            f"memory reaches {MEMORY_SHARE:.0%} and links {LINK_SHARE:.0%} of their data-sheet rates, kernels the "
            f"shares in finetune/planner/gpus.py; the host needs {self.launch_us:g} us per operation",
            f"rows to experts and gradients do not overlap with work, gathers overlap with {HIDING:.0%} of it; "
            f"reading data takes no time",
        ]


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of one step by part, and the rates that follow."""

    seconds: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    """The device's seconds by limit: memory, compute, small kernels, network."""
    host: float
    """Seconds that the host needs to launch the step's operations."""
    launches: int
    """Operations of one micro-batch."""
    model_flops: float
    """Operations of one step on one rank."""
    hardware_flops: float
    flops_per_token: float
    tokens_per_second: float
    """Tokens per second of one rank."""
    mfu: float

    @property
    def step(self) -> float:
        """Return the seconds of a step."""
        return sum(self.seconds.values())

    @property
    def limit(self) -> str:
        """Return what limits the step: the host, or the limit that takes most of the device's time."""
        waits = WAITING in self.seconds
        return "host" if waits else max(self.limits, key=lambda name: self.limits[name])


def work(config: RunConfig, base: Family, layout: RankLayout, assumed: Assumed) -> Work:
    """Return one rank's part of one packed row."""
    tokens = config.data.tokens_per_pack // layout.sp
    vision = min(tokens * assumed.vision_share, (config.data.vision_tokens_per_pack or tokens) / layout.sp)
    merged = base.vision.spatial_merge_size**2
    patches = int(vision) * merged
    return Work(
        tokens=tokens,
        supervised=int(tokens * assumed.supervised_share),
        squares=tokens * min(assumed.sample_tokens, config.data.tokens_per_pack),
        patches=patches,
        frame_squares=patches * min(assumed.image_tokens * merged, patches),
    )


def step_time(
    config: RunConfig,
    base: Family,
    layout: RankLayout,
    cluster: Cluster,
    traffic: list[Traffic],
    *,
    micro_batches: int,
    assumed: Assumed,
) -> Time:
    """Return the estimated seconds of one step of the slowest rank."""
    row, memory_rate = work(config, base, layout, assumed), cluster.gpu.reached_memory_rate
    trained = trained_tensors(base, config.adapters, ep=layout.ep)
    local_experts = base.text.experts.num_experts // layout.ep if base.text.experts else 1
    device = spent(operations(config, base, layout, row), cluster.gpu, local_experts=local_experts)
    gradient_bytes = sum(tensor.elements for tensor in trained) * (layout.itemsize + GRADIENT_BYTES)
    computing = {kind: micro_batches * seconds for kind, seconds in device.kinds.items()}
    computing["gradients added up"] = micro_batches * gradient_bytes / memory_rate
    sending = _sending(traffic, cluster, computing=sum(computing.values()))
    update = {"update": UPDATE_BYTES * slices(trained, layout) / memory_rate}
    limits = {limit: micro_batches * seconds for limit, seconds in device.limits.items()}
    limits["memory"] = limits.get("memory", 0.0) + computing["gradients added up"] + update["update"]
    limits["network"] = sum(sending.values())
    seconds = computing | update | sending
    host = micro_batches * (device.launches * assumed.launch_us / 1e6 + HOOK * _hooked(config, base, layout, trained))
    seconds[WAITING] = max(0.0, host - sum(seconds.values()))
    seconds = {name: value for name, value in seconds.items() if value}
    parts = _meter(base, config.adapters, layout.recompute).count(row).values()
    model_flops = micro_batches * sum(part.model for part in parts)
    step, tokens = sum(seconds.values()), micro_batches * row.tokens
    return Time(
        seconds=seconds,
        limits={name: value for name, value in limits.items() if value},
        host=host,
        launches=device.launches,
        model_flops=model_flops,
        hardware_flops=micro_batches * sum(part.model + part.again for part in parts),
        flops_per_token=model_flops / tokens,
        tokens_per_second=tokens / step,
        mfu=model_flops / step / cluster.gpu.flops,
    )


def _sending(traffic: list[Traffic], cluster: Cluster, *, computing: float) -> dict[str, float]:
    """Return the seconds of traffic by kind; gathers overlap with a share of the `computing` seconds."""
    seconds: dict[str, float] = {}
    for sent in traffic:
        kind = sent.kind.partition(",")[0]
        seconds[kind] = seconds.get(kind, 0.0) + sent.seconds(cluster)
    gathers = sum(seconds.pop(kind, 0.0) for kind in ("trained weights", "frozen weights"))
    return seconds | {"gathers that do not hide": max(0.0, gathers - HIDING * computing)}


def operations(config: RunConfig, base: Family, layout: RankLayout, row: Work) -> Iterator[tuple[Op, int]]:
    """Yield the operations of one micro-batch on the device of a rank, each with its number of repeats."""
    adapters, top_k = config.adapters, base.text.experts.num_experts_per_tok if base.text.experts else 0
    rows = Rows(
        tokens=row.tokens,
        supervised=row.supervised,
        patches=row.patches,
        itemsize=layout.itemsize,
        arriving=layout.skew * row.tokens * top_k,
        tiles=-(-row.tokens // layout.tile_tokens) if layout.tile_tokens else 1,
    )
    reach, sparse_layers = Reach.of(adapters), len(base.moe_layers)
    layer = partial(
        decoder_layer,
        base,
        adapters,
        rows,
        layout.recompute,
        squares=row.squares,
        ep=layout.ep,
        sp=layout.sp,
        resident=layout.resident,
        balances=config.moe.balance != "off",
        quantise=config.model.quantise,
    )
    counts = {True: sparse_layers, False: base.text.num_hidden_layers - sparse_layers}
    parts = [(layer(sparse=sparse), number) for sparse, number in counts.items() if number]
    parts.append((head(base, rows, trained=adapters.head.mode == "full", passes=reach.layers), 1))
    parts.append((around(base, adapters, rows), 1))
    if row.patches or reach.vision or not layout.resident:  # a row without media skips a resident frozen tower
        seen = rows if row.patches else _blank(rows, base)
        squares = row.frame_squares or seen.patches**2
        parts += tower(base, adapters, seen, layout.recompute, frame_squares=squares)
    for part, number in parts:
        yield from ((op, number) for op in part.every)


def _blank(rows: Rows, base: Family) -> Rows:
    """Return a row with the patches of one token, which the tower processes when the row has no media."""
    patches = base.vision.spatial_merge_size**2
    return Rows(tokens=rows.tokens, supervised=0, patches=patches, arriving=0, itemsize=rows.itemsize)


def _hooked(config: RunConfig, base: Family, layout: RankLayout, trained: tuple[Tensor, ...]) -> int:
    """Return the passes of a micro-batch through modules whose weights are gathered: two or three per module.

    A large matrix is a module; all experts of a layer are one.
    """
    frozen = (
        () if layout.resident else frozen_tensors(base, config.adapters, ep=layout.ep, quantise=config.model.quantise)
    )
    wide = [tensor for tensor in (*trained, *frozen) if tensor.elements >= layout.persistence]
    modules = sum(not tensor.expert for tensor in wide) + len(base.moe_layers) * any(tensor.expert for tensor in wide)
    return modules * (2 if layout.recompute == "none" else 3)


@cache
def _meter(base: Family, adapters: AdaptersConfig, recompute: Recompute) -> FlopMeter:
    return FlopMeter(base, trainings(adapters), recompute=recompute)
