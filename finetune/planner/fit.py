"""Finds the fastest layout that fits a cluster, by the planner's model, or a change that makes one fit.

At the start of a run the same search resolves `parallel.ep: auto` and `parallel.recompute: auto`. Loads no torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import log2
from typing import Any, Literal

from finetune.architecture.families import Family
from finetune.config import QuantiseConfig, RunConfig
from finetune.planner.gpus import GB, Cluster, this_machine
from finetune.planner.plan import Plan, plan
from finetune.planner.time import Assumed
from finetune.settings.check_adapters import quantise_problems

AUTO_EP = 0
"""The number that stands for `parallel.ep: auto`."""
GATHERING = 0.8
"""Factor on the estimated rate when weights are gathered, because the overlap with computing is least certain."""
SLICING = 0.95
"""Factor on the estimated rate for each doubling of the sequence group."""
RECOMPUTE: tuple[Literal["none", "selective", "layer"], ...] = ("none", "selective", "layer")
TOKENS = (4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)
FORMS = (
    QuantiseConfig(experts="int8"),
    QuantiseConfig(experts="nf4"),
    QuantiseConfig(experts="nf4", dense="nf4"),
    QuantiseConfig(dense="int8"),
    QuantiseConfig(dense="nf4"),
)
"""Forms that are tried in this order when nothing fits as it is; the last two are for bases without experts."""
FREE = ("ep", "sp", "resident", "recompute", "tokens", "bits")
"""The parts of a layout that the search may change by default."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """One layout with its plan; `changes` are the keys to set."""

    plan: Plan
    changes: dict[str, Any]
    reason: str

    @property
    def rate(self) -> float:
        """Return the estimated tokens per second of one rank."""
        return self.plan.time.tokens_per_second

    @property
    def kind(self) -> tuple[int, int, bool, str]:
        """Return the properties in which two proposals must differ to be listed together."""
        layout = self.plan.layout
        return layout.ep, layout.sp, layout.resident, layout.recompute


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The best proposal and the runners-up; if nothing fits, the smallest change that helps."""

    best: Proposal | None
    others: list[Proposal]
    advice: str = ""


def fit(config: RunConfig, base: Family, cluster: Cluster, *, assumed: Assumed, free: Sequence[str] = FREE) -> Fit:
    """Search the layouts; `free` names what may change."""
    proposals = fitting(config, base, cluster, assumed=assumed, free=free)
    if not proposals and "bits" in free:
        proposals = _in_fewer_bits(config, base, cluster, assumed=assumed, free=free)
    if not proposals:
        return Fit(best=None, others=[], advice=_advice(config, base, cluster, assumed, free))
    by_kind: dict[tuple[int, int, bool, str], Proposal] = {}
    for proposal in proposals:
        by_kind.setdefault(proposal.kind, proposal)
    best, *others = by_kind.values()
    return Fit(best=best, others=others[:3])


def fitting(
    config: RunConfig, base: Family, cluster: Cluster, *, assumed: Assumed, free: Sequence[str] = FREE
) -> list[Proposal]:
    """Return the layouts that fit, the best first. Unlike `fit`, search for no advice when none does."""
    proposals = _proposals(config, base, cluster, assumed, free)
    return sorted((proposal for proposal in proposals if proposal.plan.fits), key=_order)


def resolve_auto(
    config: RunConfig, base: Family, *, ranks: int, per_node: int, memory_bytes: int, device: bool
) -> RunConfig:
    """Replace `auto` for ep and recompute with the fastest values that fit this machine, the same on every rank."""
    if config.parallel.ep != AUTO_EP and config.parallel.recompute != "auto":
        return config
    gpu = this_machine(memory_bytes, device=device)
    cluster = Cluster(gpu=gpu, gpus=ranks, per_node=min(per_node, ranks))
    autos = {"ep": config.parallel.ep == AUTO_EP, "recompute": config.parallel.recompute == "auto"}
    free = [key for key, auto in autos.items() if auto]
    proposed = fit(config, base, cluster, assumed=Assumed(), free=free)
    if proposed.best is None:
        keys = " and ".join(f"parallel.{key}: auto" for key in free)
        raise ValueError(
            f"{keys}: nothing fits {ranks} ranks of {memory_bytes / GB:.0f} GB. {proposed.advice} "
            f"(`moetune plan` shows why; values other than auto are not checked against memory)"
        )
    layout = proposed.best.plan.layout
    return replace(config, parallel=replace(config.parallel, ep=layout.ep, recompute=layout.recompute))


def _in_fewer_bits(
    config: RunConfig, base: Family, cluster: Cluster, *, assumed: Assumed, free: Sequence[str]
) -> list[Proposal]:
    """Return the layouts that fit with the most bits that make one fit; experts are quantised before dense matrices."""
    for quantise in FORMS:
        changed = replace(config, model=replace(config.model, quantise=quantise))
        if quantise_problems(changed, base):
            continue
        proposals = fitting(changed, base, cluster, assumed=assumed, free=free)
        if proposals:
            old, new = asdict(config.model.quantise), asdict(quantise)
            bits = {f"model.quantise.{name}": new[name] for name in new if new[name] != old[name]}
            return [replace(proposal, changes={**bits, **proposal.changes}) for proposal in proposals]
    return []


def _order(proposal: Proposal) -> tuple[float, int, int]:
    """Return a key that sorts the fastest first, with a penalty for uncertainty, then the smallest groups."""
    layout = proposal.plan.layout
    certain = (1.0 if layout.resident else GATHERING) * SLICING ** log2(layout.sp)
    return -round(certain * proposal.rate, 1), layout.ep, layout.sp


def _proposals(
    config: RunConfig, base: Family, cluster: Cluster, assumed: Assumed, free: Sequence[str]
) -> Iterator[Proposal]:
    parallel, data = config.parallel, config.data
    ep_sizes = _ep_sizes(base, cluster) if "ep" in free else [parallel.ep]
    groups = sp_sizes(base, cluster, config) if "sp" in free else [parallel.sp]
    residents = ("frozen", "none") if "resident" in free else (parallel.resident,)
    modes = RECOMPUTE if "recompute" in free else (parallel.recompute,)
    for ep, sp, resident, recompute in product(ep_sizes, groups, residents, modes):
        for tokens in _tokens(config, base, cluster, sp) if "tokens" in free else (data.tokens_per_pack,):
            values = {
                "parallel.ep": ep,
                "parallel.sp": sp,
                "parallel.resident": resident,
                "parallel.recompute": recompute,
                "data.tokens_per_pack": tokens,
            }
            yield _proposal(config, _changed(config, values), base, cluster, assumed)


def _changed(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """Return the configuration with these values; a step keeps its tokens, so it has fewer packs if they are longer."""
    data, parallel = config.data, config.parallel
    tokens = values.get("data.tokens_per_pack", data.tokens_per_pack)
    packs = max(1, data.packs_per_step * data.tokens_per_pack // tokens)
    sections = {key.partition(".")[2]: value for key, value in values.items() if key.startswith("parallel.")}
    return replace(
        config,
        parallel=replace(parallel, **sections),
        data=replace(data, tokens_per_pack=tokens, packs_per_step=packs),
    )


def _proposal(config: RunConfig, changed: RunConfig, base: Family, cluster: Cluster, assumed: Assumed) -> Proposal:
    planned = plan(changed, base, cluster, assumed=assumed)
    pairs = {
        "parallel.ep": (config.parallel.ep, changed.parallel.ep),
        "parallel.sp": (config.parallel.sp, changed.parallel.sp),
        "parallel.resident": (config.parallel.resident, changed.parallel.resident),
        "parallel.recompute": (config.parallel.recompute, changed.parallel.recompute),
        "data.tokens_per_pack": (config.data.tokens_per_pack, changed.data.tokens_per_pack),
        "data.packs_per_step": (config.data.packs_per_step, changed.data.packs_per_step),
    }
    changes = {key: new for key, (old, new) in pairs.items() if old != new}
    return Proposal(plan=planned, changes=changes, reason=_reason(planned))


def _reason(planned: Plan) -> str:
    """Return a sentence that says why one would choose the plan."""
    layout, time = planned.layout, planned.time
    way = "frozen weights resident, none of them gathered" if layout.resident else "frozen weights partitioned"
    where = "inside a node" if layout.ep <= planned.cluster.per_node else "across nodes"
    group = "" if layout.ep == 1 else f", experts over {layout.ep} ranks {where}"
    longest = max(time.seconds, key=lambda name: time.seconds[name])
    return (
        f"{time.tokens_per_second:,.0f} tokens/s per GPU, {planned.margin / GB:.1f} GB free: {way}{group}; "
        f"most time goes to {longest} ({time.seconds[longest] / time.step:.0%})"
    )


def _ep_sizes(base: Family, cluster: Cluster) -> list[int]:
    experts = base.text.experts
    if experts is None:
        return [1]
    sizes = range(1, min(cluster.gpus, 64) + 1)
    return [size for size in sizes if not cluster.gpus % size and not experts.num_experts % size]


def sp_sizes(base: Family, cluster: Cluster, config: RunConfig) -> list[int]:
    """Return the sizes that divide the heads and give each group the same number of rows; [1] if there is none.

    Slices are for rows that one rank cannot hold: below 2,048 tokens, return the smallest size only.
    """
    longest = max(1, config.data.tokens_per_pack // 2048)
    sizes = [size for size in (1, 2, 4, 8) if not cluster.gpus % size and not base.text.num_attention_heads % size]
    sizes = [size for size in sizes if config.data.packs_per_step % (cluster.gpus // size) == 0] or [1]
    return [size for size in sizes if size <= longest] or sizes[:1]


def _tokens(config: RunConfig, base: Family, cluster: Cluster, sp: int) -> list[int]:
    """Return row lengths from the recipe's up that keep the tokens per step and leave every rank a row."""
    shortest = config.data.tokens_per_pack
    step, ranks = shortest * config.data.packs_per_step, cluster.gpus // sp
    lengths = [shortest, *(length for length in TOKENS if shortest < length <= base.text.max_position_embeddings)]
    return [length for length in lengths if step % length == 0 and (step // length) % ranks == 0] or [shortest]


def _advice(config: RunConfig, base: Family, cluster: Cluster, assumed: Assumed, free: Sequence[str]) -> str:
    """Return the smallest change of the configuration, or else of the cluster, that makes a layout fit."""
    least = replace(config, parallel=replace(config.parallel, recompute="layer"))  # the mode that takes least
    every = tuple(dict.fromkeys([*free, "ep", "sp", "resident"]))
    every = tuple(key for key in every if key not in ("recompute", "tokens", "bits"))

    def helps(changed: RunConfig, machines: Cluster) -> bool:
        return any(proposal.plan.fits for proposal in _proposals(changed, base, machines, assumed, every))

    for tokens in (config.data.tokens_per_pack // parts for parts in (2, 4, 8, 16)):
        if tokens >= 512 and helps(_changed(least, {"data.tokens_per_pack": tokens}), cluster):
            return f"The smallest change that helps: data.tokens_per_pack={tokens}."
    experts = config.adapters.experts
    if experts.mode == "lora" and experts.r > 8:
        adapters = replace(config.adapters, experts=replace(experts, r=8))
        if helps(replace(least, adapters=adapters), cluster):
            return "The smallest change that helps: adapters.experts.r=8."
    for times in (2, 4, 8, 16, 32):
        gpus = cluster.gpus * times
        if helps(least, replace(cluster, gpus=gpus, per_node=min(max(8, cluster.per_node), gpus))):
            return f"The smallest change that helps: {gpus} GPUs of this kind."
    return "Not even 32 times as many GPUs of this kind are enough: train fewer parameters, or use larger GPUs."
