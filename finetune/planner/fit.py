"""Which layout fits a cluster and is fastest by the planner's model; and what to change when none fits. No torch.

`parallel.ep: auto` and `parallel.recompute: auto` are settled here at the start of a run, by the same search.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import log2
from typing import Any, Literal

from finetune.architecture.families import Family
from finetune.config import RunConfig
from finetune.planner.gpus import GB, HOPPER, Cluster, Gpu
from finetune.planner.plan import Plan, plan
from finetune.planner.time import Assumed

AUTO_EP = 0
"""What `parallel.ep: auto` is until it is settled."""
GATHERING, SLICING = 0.8, 0.95
"""How far the promised rate counts where weights are gathered, and for each doubling of a sequence group: what hides
behind the computing is the least certain of the assumptions."""
RECOMPUTE: tuple[Literal["none", "selective", "layer"], ...] = ("none", "selective", "layer")
TOKENS = (4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """One layout with its plan; `changes` are the keys to set."""

    plan: Plan
    changes: dict[str, Any]
    reason: str

    @property
    def rate(self) -> float:
        """Tokens a second of one rank, by the model."""
        return self.plan.time.tokens_per_second


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What is proposed, what comes after it, and, where nothing fits, the smallest change that helps."""

    best: Proposal | None
    others: list[Proposal]
    advice: str = ""


def fit(
    config: RunConfig, base: Family, cluster: Cluster, *, assumed: Assumed, free: Sequence[str] = ("ep", "sp",
    "resident", "recompute", "tokens"),
) -> Fit:  # fmt: skip
    """Search the layouts; `free` names what may change."""
    fitting = sorted((one for one in _proposals(config, base, cluster, assumed, free) if one.plan.fits), key=_order)
    if fitting:
        chosen: list[Proposal] = []
        for one in fitting:  # one of each kind: runners-up that differ in more than a detail
            kind = (one.plan.layout.ep, one.plan.layout.sp, one.plan.layout.resident, one.plan.layout.recompute)
            layout = [(p.plan.layout.ep, p.plan.layout.sp, p.plan.layout.resident, p.plan.layout.recompute)
                      for p in chosen]  # fmt: skip
            if kind not in layout:
                chosen.append(one)
        return Fit(best=chosen[0], others=chosen[1:4])
    return Fit(best=None, others=[], advice=_advice(config, base, cluster, assumed, free))


def settle(config: RunConfig, base: Family, *, ranks: int, per_node: int, memory_bytes: int, device: bool) -> RunConfig:
    """Replace `auto` of ep and recompute by the fastest that fits this machine; every rank finds the same."""
    if config.parallel.ep != AUTO_EP and config.parallel.recompute != "auto":
        return config
    known = Gpu(
        name="this machine", memory_bytes=memory_bytes, flops=989e12 if device else 1e11,
        memory_rate=3e12 if device else 1e10, link_rate=450e9 if device else 1e9, network_rate=50e9 if device else 1e9,
        kernels=HOPPER,
    )  # fmt: skip
    cluster = Cluster(gpu=known, gpus=ranks, per_node=min(per_node, ranks))
    autos = {"ep": config.parallel.ep == AUTO_EP, "recompute": config.parallel.recompute == "auto"}
    free = [key for key, auto in autos.items() if auto]
    found = fit(config, base, cluster, assumed=Assumed(), free=free)
    if found.best is None:
        keys = " and ".join(f"parallel.{key}: auto" for key in free)
        raise ValueError(
            f"{keys}: nothing fits {ranks} ranks of {memory_bytes / GB:.0f} GB. {found.advice} "
            f"(`moetune plan` shows why; a value instead of auto is not checked against memory)"
        )
    layout = found.best.plan.layout
    return replace(config, parallel=replace(config.parallel, ep=layout.ep, recompute=layout.recompute))


def _order(one: Proposal) -> tuple[float, int, int]:
    """Fastest first, with doubt where the model is least certain; of equals the smallest groups."""
    layout = one.plan.layout
    certain = (1.0 if layout.resident else GATHERING) * SLICING ** log2(layout.sp)
    return -round(certain * one.rate, 1), layout.ep, layout.sp


def _proposals(
    config: RunConfig, base: Family, cluster: Cluster, assumed: Assumed, free: Sequence[str]
) -> Iterator[Proposal]:
    parallel, data = config.parallel, config.data
    for ep in _ep_sizes(base, cluster) if "ep" in free else (parallel.ep,):
        for sp in sp_sizes(base, cluster, config) if "sp" in free else (parallel.sp,):
            for resident in ("frozen", "none") if "resident" in free else (parallel.resident,):
                for recompute in RECOMPUTE if "recompute" in free else (parallel.recompute,):
                    for tokens in _tokens(config, base, cluster, sp) if "tokens" in free else (data.tokens_per_pack,):
                        changed = _changed(
                            config, {"parallel.ep": ep, "parallel.sp": sp, "parallel.resident": resident,
                                     "parallel.recompute": recompute, "data.tokens_per_pack": tokens}
                        )  # fmt: skip
                        yield _proposal(config, changed, base, cluster, assumed)


def _changed(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The configuration with these values; a step keeps its tokens, so fewer packs when they are longer."""
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
    found = plan(changed, base, cluster, assumed=assumed)
    pairs = {
        "parallel.ep": (config.parallel.ep, changed.parallel.ep),
        "parallel.sp": (config.parallel.sp, changed.parallel.sp),
        "parallel.resident": (config.parallel.resident, changed.parallel.resident),
        "parallel.recompute": (config.parallel.recompute, changed.parallel.recompute),
        "data.tokens_per_pack": (config.data.tokens_per_pack, changed.data.tokens_per_pack),
        "data.packs_per_step": (config.data.packs_per_step, changed.data.packs_per_step),
    }
    changes = {key: new for key, (old, new) in pairs.items() if old != new}
    return Proposal(plan=found, changes=changes, reason=_reason(found))


def _reason(found: Plan) -> str:
    """Why one would take it, in a sentence."""
    layout, times = found.layout, found.time.seconds
    way = "frozen weights resident, nothing of them gathered" if layout.resident else "frozen weights partitioned"
    first, share = max(((name, value / found.time.step) for name, value in times.items()), key=lambda pair: pair[1])
    group = (
        ""
        if layout.ep == 1
        else f", experts over {layout.ep} ranks"
        + (" inside a node" if layout.ep <= found.cluster.per_node else " across nodes")
    )
    return (
        f"{found.time.tokens_per_second:,.0f} tokens/s a GPU, {found.margin / GB:.1f} GB free: {way}{group}; "
        f"most time goes to {first} ({share:.0%})"
    )


def _ep_sizes(base: Family, cluster: Cluster) -> list[int]:
    experts = base.text.experts
    if experts is None:
        return [1]
    return [n for n in range(1, min(cluster.gpus, 64) + 1) if not cluster.gpus % n and not experts.num_experts % n]


def sp_sizes(base: Family, cluster: Cluster, config: RunConfig) -> list[int]:
    """The sizes with heads for each rank and whole rows for each group; 1 if there is none.

    Slices are for rows that one rank cannot hold: below 2,048 tokens the smallest size only.
    """
    longest = max(1, config.data.tokens_per_pack // 2048)
    sizes = [n for n in (1, 2, 4, 8) if not cluster.gpus % n and not base.text.num_attention_heads % n]
    sizes = [n for n in sizes if config.data.packs_per_step % (cluster.gpus // n) == 0] or [1]
    return [n for n in sizes if n <= longest] or sizes[:1]


def _tokens(config: RunConfig, base: Family, cluster: Cluster, sp: int) -> list[int]:
    """Rows not shorter than what was asked, with as many tokens a step, while every rank still has a row."""
    step, asked = config.data.tokens_per_pack * config.data.packs_per_step, config.data.tokens_per_pack
    ranks = cluster.gpus // sp
    wanted = [asked, *(n for n in TOKENS if asked < n <= base.text.max_position_embeddings)]
    return [n for n in wanted if step % n == 0 and (step // n) % ranks == 0] or [asked]


def _advice(config: RunConfig, base: Family, cluster: Cluster, assumed: Assumed, free: Sequence[str]) -> str:
    """The smallest change of the configuration, else of the cluster, with which something fits."""
    least = replace(config, parallel=replace(config.parallel, recompute="layer"))  # the mode that needs least
    every = tuple(dict.fromkeys([*free, "ep", "sp", "resident"]))
    every = tuple(key for key in every if key not in ("recompute", "tokens"))

    def helps(changed: RunConfig, machines: Cluster) -> bool:
        return any(one.plan.fits for one in _proposals(changed, base, machines, assumed, every))

    for tokens in (config.data.tokens_per_pack // n for n in (2, 4, 8, 16)):
        if tokens >= 512 and helps(_changed(least, {"data.tokens_per_pack": tokens}), cluster):
            return f"The smallest change that helps: data.tokens_per_pack={tokens}."
    family = config.adapters.experts
    if family.mode == "lora" and family.r > 8:
        adapters = replace(config.adapters, experts=replace(family, r=8))
        if helps(replace(least, adapters=adapters), cluster):
            return "The smallest change that helps: adapters.experts.r=8."
    for times in (2, 4, 8, 16, 32):
        gpus = cluster.gpus * times
        if helps(least, replace(cluster, gpus=gpus, per_node=min(max(8, cluster.per_node), gpus))):
            return f"The smallest change that helps: {gpus} GPUs of this kind."
    return "Not even 32 times as many GPUs of this kind hold it: train fewer parameters, or take larger GPUs."
