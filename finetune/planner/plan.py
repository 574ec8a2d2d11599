"""Estimates a run before it starts: memory, traffic, time, cost, host and disk. Loads no torch.

`plan` composes the parts, each of which is a formula in its own file. `moetune plan` prints the plan, and training
writes it to plan.json next to the values that it measures.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any

from finetune.architecture.families import Family
from finetune.architecture.parts import PARTS
from finetune.architecture.rank_shares import ResidentChoice, choose_resident, has_room
from finetune.architecture.shapes import active_text_parameters, parameter_counts, parameter_shapes
from finetune.architecture.trained import trained_tensors
from finetune.config import AS_THEY_ARE, QuantiseConfig, RunConfig
from finetune.planner.gpus import GB, Cluster
from finetune.planner.memory import Memory, memory
from finetune.planner.moments import waiting
from finetune.planner.rank_layout import RankLayout
from finetune.planner.time import Assumed, Time, step_time
from finetune.planner.wire import Traffic, traffic
from finetune.settings.stages import run_stages

ITEMSIZE = {"bfloat16": 2, "float32": 4}
RANK_HOST_BYTES = int(4.5 * GB)
"""Host memory of the process of one rank, with its libraries and the device's context."""
WORKER_HOST_BYTES = int(1.2 * GB)
"""Host memory of one reading worker."""
STATE_BYTES = 12
"""Bytes of a trained element in a checkpoint: master and two moments in float32."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """Bytes of memory of one node, and of disk for the complete run, by purpose."""

    memory: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The complete estimate of one run on one cluster."""

    model: str
    stage: str
    """The stage that needs the most memory; empty for a run without stages."""
    cluster: Cluster
    layout: RankLayout
    resident_reason: str
    micro_batches: int
    steps: int
    memory: Memory
    traffic: list[Traffic]
    time: Time
    host: Host
    parameters: int
    active: int
    trained: int
    assumed: Assumed
    quantised: QuantiseConfig = AS_THEY_ARE

    @property
    def runs_one_by_one(self) -> bool:
        """Return whether experts run one after the other, as torch has no grouped kernel for the device."""
        return "grouped_mm" in self.time.seconds and not self.cluster.gpu.has_grouped_mm

    @property
    def margin(self) -> int:
        """Return the bytes of a device that stay free; negative if the run does not fit."""
        return self.cluster.gpu.memory_bytes - self.memory.total

    @property
    def fits(self) -> bool:
        """Return whether the run fits every rank with the required margin."""
        return has_room(needed_bytes=self.memory.total, room_bytes=self.cluster.gpu.memory_bytes)

    @property
    def hours(self) -> float | None:
        """Return the GPU hours of the complete schedule; None if its length is given in epochs."""
        if not self.steps:
            return None
        return self.steps * self.time.step * self.cluster.gpus / 3600

    @property
    def cost(self) -> float | None:
        """Return the cost of those hours; None without a price."""
        return None if self.cluster.price is None or self.hours is None else self.hours * self.cluster.price

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "model": self.model,
            "stage": self.stage,
            "cluster": {**asdict(self.cluster), "nodes": self.cluster.nodes},
            "layout": asdict(self.layout),
            "resident_reason": self.resident_reason,
            "quantised": asdict(self.quantised),
            "micro_batches": self.micro_batches,
            "parameters": {"total": self.parameters, "active": self.active, "trained": self.trained},
            "memory": {
                "components": self.memory.components,
                "between_steps": self.memory.static,
                "moments": {moment.name: self.memory.static + moment.total for moment in self.memory.moments},
                "peak_tensors": self.memory.peak,
                "total": self.memory.total,
                "device": self.cluster.gpu.memory_bytes,
                "margin": self.margin,
                "fits": self.fits,
            },
            "traffic": [{**asdict(kind), "seconds": kind.seconds(self.cluster)} for kind in self.traffic],
            "time": {**asdict(self.time), "step": self.time.step, "limit": self.time.limit},
            "gpu_hours": self.hours,
            "cost": self.cost,
            "host": asdict(self.host),
            "assumed": asdict(self.assumed),
        }


def resident_choice(config: RunConfig, base: Family, cluster: Cluster, assumed: Assumed) -> ResidentChoice:
    """Decide `parallel.resident` once per run: its fullest stage must fit with frozen weights resident."""

    def needed() -> int:
        return max(
            memory(stage, base, _layout(stage, base, cluster, assumed, resident=True)).total
            for _, stage in _stages(config)
        )

    return choose_resident(config.parallel.resident, needed_bytes=needed, room_bytes=cluster.gpu.memory_bytes)


def plan(config: RunConfig, base: Family, cluster: Cluster, *, assumed: Assumed | None = None) -> Plan:
    """Plan a run whose configuration passed every check for these ranks; of several stages, plan the fullest."""
    if config.parallel.recompute == "auto" or config.parallel.ep < 1:
        raise ValueError("parallel.ep, parallel.recompute: auto must be resolved before a run is planned (planner.fit)")
    assumed = assumed or Assumed()
    choice = resident_choice(config, base, cluster, assumed)
    plans = (_plan(stage, base, cluster, assumed, name, choice) for name, stage in _stages(config))
    return max(plans, key=lambda plan: plan.memory.total)


def _stages(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Yield each stage with its name, as a run of its own."""
    for stage in run_stages(config):
        yield stage.name, replace(config, data=stage.data, parallel=replace(config.parallel, sp=stage.sp))


def _layout(config: RunConfig, base: Family, cluster: Cluster, assumed: Assumed, *, resident: bool) -> RankLayout:
    """Return the layout of a configuration without `auto`."""
    parallel = config.parallel
    assert parallel.recompute != "auto"
    return RankLayout(
        world=cluster.gpus,
        ep=parallel.ep,
        sp=parallel.sp,
        layers=base.text.num_hidden_layers,
        resident=resident,
        tile_tokens=parallel.tile_tokens,
        offload=parallel.offload_activations,
        recompute=parallel.recompute,
        itemsize=ITEMSIZE[config.model.dtype],
        skew=assumed.skew_of(parallel.ep),
    )


def _plan(
    config: RunConfig, base: Family, cluster: Cluster, assumed: Assumed, stage: str, choice: ResidentChoice
) -> Plan:
    layout = _layout(config, base, cluster, assumed, resident=choice.resident)
    micro_batches = -(-config.data.packs_per_step // (cluster.gpus // layout.sp))
    sent = traffic(config, base, layout, cluster, micro_batches=micro_batches)
    trained = trained_elements(config, base)
    return Plan(
        model=base.name,
        stage=stage,
        cluster=cluster,
        layout=layout,
        resident_reason=choice.reason,
        micro_batches=micro_batches,
        steps=config.schedule.steps,
        memory=memory(config, base, layout),
        traffic=sent,
        time=step_time(config, base, layout, cluster, sent, micro_batches=micro_batches, assumed=assumed),
        host=_host(config, base, cluster, trained, waits=waiting(config, base, layout)),
        parameters=parameter_counts(base).total,
        active=active_text_parameters(base),
        trained=trained,
        assumed=assumed,
        quantised=config.model.quantise,
    )


def _host(config: RunConfig, base: Family, cluster: Cluster, trained: int, *, waits: int) -> Host:
    """Return the bytes for loading, reading data and checkpoints; `waits` are a rank's activations in host memory."""
    ranks, itemsize = min(cluster.per_node, cluster.gpus), ITEMSIZE[config.model.dtype]
    weights = 2 * parameter_counts(base).total
    memory_parts = {
        "ranks": ranks * RANK_HOST_BYTES,
        "reading workers": ranks * config.data.workers * WORKER_HOST_BYTES,
        "largest tensor while loading": itemsize * max(prod(shape) for shape in parameter_shapes(base).values()),
        "activations that wait": ranks * waits,
    }
    disk_parts = {
        "base model": weights,
        **run_bytes(config, base, trained=trained),
        "merged model": weights if _adapts(config) else 0,
    }
    return Host(memory=_without_zeros(memory_parts), disk=_without_zeros(disk_parts))


def run_bytes(config: RunConfig, base: Family, *, trained: int) -> dict[str, int]:
    """Return the bytes that a run writes to its folder, by purpose; `trained` is the number of trained elements."""
    adapts, itemsize = _adapts(config), ITEMSIZE[config.model.dtype]
    return {
        "checkpoints": STATE_BYTES * trained * (config.checkpoint.keep + 1),  # one more during a save
        "adapter" if adapts else "model": itemsize * trained if adapts else 2 * parameter_counts(base).total,
    }


def trained_elements(config: RunConfig, base: Family) -> int:
    """Return the number of trained elements."""
    return sum(tensor.elements for tensor in trained_tensors(base, config.adapters, ep=1))


def _without_zeros(parts: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}


def _adapts(config: RunConfig) -> bool:
    return any(getattr(config.adapters, part).mode == "lora" for part in PARTS)
