"""Formats a plan for people. Loads no torch."""

from collections.abc import Iterator
from dataclasses import asdict

from data.format.printable import count_of
from finetune.architecture.rank_shares import LEAST_MARGIN
from finetune.planner.fit import Fit
from finetune.planner.gpus import GB, GROUPED_FROM
from finetune.planner.plan import Plan


def plan_lines(plan: Plan) -> Iterator[str]:
    """Yield the lines of the complete plan."""
    yield from _title(plan)
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _traffic(plan)
    yield ""
    yield from _time(plan)
    yield ""
    for word, parts in (("host memory of a node", plan.host.memory), ("disk", plan.host.disk)):
        listed = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts.items())
        yield f"{word}: {sum(parts.values()) / GB:.1f} GB ({listed})"
    yield ""
    yield "assumed"
    for sentence in plan.assumed.sentences():
        yield f"  {sentence}"


def _title(plan: Plan) -> Iterator[str]:
    cluster, layout = plan.cluster, plan.layout
    yield (
        f"{plan.model}: {plan.parameters:,} parameters, {plan.active:,} active per text token, {plan.trained:,} trained"
    )
    stage = f", fullest in stage {plan.stage}" if plan.stage else ""
    yield (
        f"{cluster.gpus} x {cluster.gpu.name} in {count_of(cluster.nodes, 'node')}: ep {layout.ep}, sp {layout.sp}, "
        f"recompute {layout.recompute}, {plan.micro_batches} micro-batch(es) per step on each rank{stage}"
    )
    yield f"frozen weights {'resident' if layout.resident else 'partitioned'} ({plan.resident_reason})"
    forms = [f"{name} in {bits}" for name, bits in asdict(plan.quantised).items() if bits != "none"]
    if forms:
        yield f"quantised: {', '.join(forms)}"
    if plan.runs_one_by_one:
        yield (
            f"compute capability {cluster.gpu.capability:g}: torch has no grouped kernel below {GROUPED_FROM:g}, so "
            f"experts run one by one"
        )


def _memory(plan: Plan) -> Iterator[str]:
    yield f"memory of a rank at its highest moment ({plan.memory.highest.name})"
    for name, size in plan.memory.components.items():
        yield f"  {name:<36}{size / GB:>9.2f} GB"
    room = f"{plan.cluster.gpu.memory_bytes / GB:.2f}: {abs(plan.margin) / GB:.2f} GB "
    room += (
        "MISSING" if plan.margin < 0 else "free" if plan.fits else f"free, LESS than the margin of {LEAST_MARGIN:.0%}"
    )
    yield f"  {'total':<36}{plan.memory.total / GB:>9.2f} GB of {room}"
    others = (f"{moment.name} {(plan.memory.static + moment.total) / GB:.2f}" for moment in plan.memory.moments)
    yield f"  tensors by moment, GB: {', '.join(others)}"


def _traffic(plan: Plan) -> Iterator[str]:
    yield "traffic of one rank per step"
    for kind in plan.traffic:
        where = "inside a node" if kind.link == "node" else "between nodes"
        yield (
            f"  {kind.kind:<36}{kind.bytes / GB:>9.2f} GB over {kind.group} ranks, {where}, "
            f"{kind.seconds(plan.cluster):.2f} s if nothing hides it"
        )
    if not plan.traffic:
        yield "  nothing"


def _time(plan: Plan) -> Iterator[str]:
    time = plan.time
    yield f"operations: {time.flops_per_token / 1e9:.2f} G per token, {time.model_flops / 1e12:.1f} T per rank and step"
    longest = sorted(time.seconds.items(), key=lambda part: -part[1])
    yield f"a step takes {time.step:.2f} s by the model below: " + ", ".join(
        f"{name} {seconds:.2f}" for name, seconds in longest if seconds >= 0.01 * time.step
    )
    yield _limit(plan)
    yield f"{time.tokens_per_second:,.0f} tokens/s per GPU, {time.mfu:.1%} of its peak"
    if plan.hours is None:
        yield "the hours depend on schedule.epochs and the shards; schedule.steps=N shows the hours of N steps"
        return
    price = "" if plan.cost is None else f", {plan.cost:,.0f} at {plan.cluster.price:g} per hour"
    yield f"{plan.steps:,} steps: {plan.steps * time.step / 3600:.1f} hours, {plan.hours:,.1f} GPU hours{price}"


def _limit(plan: Plan) -> str:
    """Return a line that says whether host or device decides the time, and what limits the device."""
    time = plan.time
    longest = sorted(time.limits.items(), key=lambda limit: -limit[1])
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in longest)
    device = sum(time.limits.values())
    operations = f"{plan.micro_batches} x {time.launches:,} operations"
    if time.limit == "host":
        return f"the host decides: {time.host:.2f} s for {operations}; the device needs {device:.2f} ({parts})"
    return (
        f"the device decides, most of all its {time.limit}: {parts}; the host needs {time.host:.2f} s for {operations}"
    )


def fit_lines(fit: Fit) -> Iterator[str]:
    """Yield the lines of the proposal, its reason, and the runners-up."""
    if fit.best is None:
        yield f"nothing fits. {fit.advice}"
        return
    for number, proposal in enumerate([fit.best, *fit.others]):
        layout = proposal.plan.layout
        title = "proposed" if number == 0 else f"runner-up {number}"
        way = "resident" if layout.resident else "partitioned"
        yield f"{title}: ep {layout.ep}, sp {layout.sp}, {way}, recompute {layout.recompute}"
        yield f"  {proposal.reason}"
        changes = " ".join(f"{key}={value}" for key, value in proposal.changes.items())
        yield f"  {changes or 'no changes to the recipe'}"
