"""What a run will take before it takes it: memory, traffic, time, cost, host and disk. Loads no torch.

`plan` composes the parts; each is a formula whose sources say what it follows. `moetune plan` prints it, training
writes it to plan.json beside what it then measures.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any

from finetune.architecture.families import Family
from finetune.architecture.rank_shares import ResidentChoice, choose_resident, has_room
from finetune.architecture.shapes import active_text_parameters, parameter_counts, parameter_shapes
from finetune.config import RunConfig
from finetune.planner.gpus import GB, Cluster
from finetune.planner.memory import Memory, memory
from finetune.planner.moments import waiting
from finetune.planner.rank_layout import Layout
from finetune.planner.tensors import trained_tensors
from finetune.planner.time import Assumed, Time, step_time
from finetune.planner.wire import Traffic, traffic
from finetune.settings.stages import run_stages

ITEMSIZE = {"bfloat16": 2, "float32": 4}
RANK_HOST_BYTES, WORKER_HOST_BYTES = int(4.5 * GB), int(1.2 * GB)
"""Of one rank's process with its libraries and the device's context, and of one reading worker."""
STATE_BYTES = 12
"""A trained element in a checkpoint: master and two moments in float32."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """Memory of one node and disk of the whole run, in bytes, by what they go to."""

    memory: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is foreseen of one run on one cluster."""

    model: str
    stage: str
    """Of the run, the one that needs most; empty for a run without stages."""
    cluster: Cluster
    layout: Layout
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

    @property
    def margin(self) -> int:
        """Bytes of a device that stay free; negative where it does not fit."""
        return self.cluster.gpu.memory_bytes - self.memory.total

    @property
    def fits(self) -> bool:
        """Whether every rank has room, and some to spare."""
        return has_room(needed_bytes=self.memory.total, room_bytes=self.cluster.gpu.memory_bytes)

    @property
    def hours(self) -> float:
        """Of GPUs, all together, for the whole schedule."""
        return self.steps * self.time.step * self.cluster.gpus / 3600

    @property
    def cost(self) -> float | None:
        """Of those hours; None without a price."""
        return None if self.cluster.price is None else self.hours * self.cluster.price

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "model": self.model,
            "stage": self.stage,
            "cluster": {**asdict(self.cluster), "nodes": self.cluster.nodes},
            "layout": asdict(self.layout),
            "resident_reason": self.resident_reason,
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
            "traffic": [{**asdict(one), "seconds": one.seconds(self.cluster)} for one in self.traffic],
            "time": {**asdict(self.time), "step": self.time.step, "limit": self.time.limit},
            "gpu_hours": self.hours,
            "cost": self.cost,
            "host": asdict(self.host),
            "assumed": asdict(self.assumed),
        }


def resident_choice(config: RunConfig, base: Family, cluster: Cluster, assumed: Assumed) -> ResidentChoice:
    """Decide `parallel.resident` once for a run: its fullest stage must have room where frozen weights stay whole."""

    def needed() -> int:
        layouts = ((then, _layout(then, base, cluster, assumed, resident=True)) for _, then in _stages(config))
        return max(memory(then, base, layout).total for then, layout in layouts)

    return choose_resident(config.parallel.resident, needed_bytes=needed, room_bytes=cluster.gpu.memory_bytes)


def plan(config: RunConfig, base: Family, cluster: Cluster, *, assumed: Assumed | None = None) -> Plan:
    """Foresee a run whose configuration passed every check for so many ranks; of several stages, the fullest."""
    if config.parallel.recompute == "auto" or config.parallel.ep < 1:
        raise ValueError("parallel.ep, parallel.recompute: auto is settled before a plan is made (planner.fit)")
    assumed = assumed or Assumed()
    choice = resident_choice(config, base, cluster, assumed)
    found = [_plan(then, base, cluster, assumed, name, choice) for name, then in _stages(config)]
    return max(found, key=lambda one: one.memory.total)


def _stages(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Each stage by its name, as a run of its own."""
    for stage in run_stages(config):
        yield stage.name, replace(config, data=stage.data, parallel=replace(config.parallel, sp=stage.sp))


def _layout(config: RunConfig, base: Family, cluster: Cluster, assumed: Assumed, *, resident: bool) -> Layout:
    """The layout of a configuration whose `auto`s are settled."""
    parallel = config.parallel
    assert parallel.recompute != "auto"
    return Layout(
        world=cluster.gpus, ep=parallel.ep, sp=parallel.sp, layers=base.text.num_hidden_layers, resident=resident,
        tile_tokens=parallel.tile_tokens, offload=parallel.offload_activations, recompute=parallel.recompute,
        itemsize=ITEMSIZE[config.model.dtype], skew=assumed.skew_of(parallel.ep),
    )  # fmt: skip


def _plan(
    config: RunConfig, base: Family, cluster: Cluster, assumed: Assumed, stage: str, choice: ResidentChoice
) -> Plan:
    layout = _layout(config, base, cluster, assumed, resident=choice.resident)
    micro_batches = -(-config.data.packs_per_step // (cluster.gpus // layout.sp))
    moved = traffic(config, base, layout, cluster, micro_batches=micro_batches)
    counts = parameter_counts(base)
    everything = trained_tensors(base, config.adapters, ep=1)
    trained = sum(tensor.elements for tensor in everything)
    return Plan(
        model=base.name,
        stage=stage,
        cluster=cluster,
        layout=layout,
        resident_reason=choice.reason,
        micro_batches=micro_batches,
        steps=config.schedule.steps,
        memory=memory(config, base, layout),
        traffic=moved,
        time=step_time(config, base, layout, cluster, moved, micro_batches=micro_batches, assumed=assumed),
        host=_host(config, base, cluster, trained, waits=waiting(config, base, layout)),
        parameters=counts.total,
        active=active_text_parameters(base),
        trained=trained,
        assumed=assumed,
    )


def _host(config: RunConfig, base: Family, cluster: Cluster, trained: int, *, waits: int) -> Host:
    """What loading, reading data and checkpoints take."""
    here, itemsize = min(cluster.per_node, cluster.gpus), ITEMSIZE[config.model.dtype]
    shapes = parameter_shapes(base)
    largest = itemsize * max(prod(shape) for shape in shapes.values())
    weights, adapted = 2 * parameter_counts(base).total, _adapts(config)
    memory_parts = {
        "ranks": here * RANK_HOST_BYTES,
        "reading workers": here * config.data.workers * WORKER_HOST_BYTES,
        "largest tensor while loading": largest,
        "activations that wait": here * waits,
    }
    disk = {
        "base model": weights,
        "checkpoints": STATE_BYTES * trained * (config.checkpoint.keep + 1),  # one more while it is written
        "adapter" if adapted else "model": itemsize * trained if adapted else weights,
        "merged model": weights if adapted else 0,
    }
    memory_parts = {name: size for name, size in memory_parts.items() if size}
    return Host(memory=memory_parts, disk={name: size for name, size in disk.items() if size})


def _adapts(config: RunConfig) -> bool:
    sections: Mapping[str, Any] = {k: v for k, v in asdict(config.adapters).items() if isinstance(v, dict)}
    return any(section["mode"] == "lora" for section in sections.values())
