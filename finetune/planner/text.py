"""A plan as people read it. Loads no torch."""

from collections.abc import Iterator

from finetune.architecture.rank_shares import LEAST_MARGIN
from finetune.planner.fit import Fit
from finetune.planner.gpus import GB
from finetune.planner.plan import Plan


def plan_lines(plan: Plan) -> Iterator[str]:
    """The whole plan, a number a line."""
    cluster, layout, time = plan.cluster, plan.layout, plan.time
    yield (
        f"{plan.model}: {plan.parameters:,} parameters, {plan.active:,} of them for a text token, "
        f"{plan.trained:,} trained"
    )
    stage = f", fullest in stage {plan.stage}" if plan.stage else ""
    yield (
        f"{cluster.gpus} x {cluster.gpu.name} in {cluster.nodes} node(s): ep {layout.ep}, sp {layout.sp}, "
        f"recompute {layout.recompute}, {plan.micro_batches} micro-batch(es) a step on each rank{stage}"
    )
    yield f"frozen weights {'resident' if layout.resident else 'partitioned'} ({plan.resident_reason})"
    yield ""
    yield f"memory of a rank at its highest moment ({plan.memory.highest.name})"
    for name, size in plan.memory.components.items():
        yield f"  {name:<36}{size / GB:>9.2f} GB"
    room = f"{cluster.gpu.memory_bytes / GB:.2f}: {abs(plan.margin) / GB:.2f} GB "
    room += (
        "MISSING" if plan.margin < 0 else "free" if plan.fits else f"free, LESS than the {LEAST_MARGIN:.0%} to spare"
    )
    yield f"  {'in all':<36}{plan.memory.total / GB:>9.2f} GB of {room}"
    others = (f"{one.name} {(plan.memory.static + one.total) / GB:.2f}" for one in plan.memory.moments)
    yield f"  tensors by moment, GB: {', '.join(others)}"
    yield ""
    yield "on the wire, of one rank in a step"
    for one in plan.traffic:
        where = "inside a node" if one.link == "node" else "between nodes"
        yield (
            f"  {one.kind:<36}{one.bytes / GB:>9.2f} GB over {one.group} ranks, {where}, "
            f"{one.seconds(cluster):.2f} s if nothing hides it"
        )
    if not plan.traffic:
        yield "  nothing"
    yield ""
    yield f"operations: {time.flops_per_token / 1e9:.2f} G a token, {time.model_flops / 1e12:.1f} T a rank and step"
    longest = sorted(time.seconds.items(), key=lambda part: -part[1])
    yield f"a step takes {time.step:.2f} s by the model below: " + ", ".join(
        f"{name} {seconds:.2f}" for name, seconds in longest if seconds >= 0.01 * time.step
    )
    yield _limit(plan)
    yield f"{time.tokens_per_second:,.0f} tokens/s a GPU, {time.mfu:.1%} of its peak"
    price = "" if plan.cost is None else f", {plan.cost:,.0f} at {cluster.price:g} an hour"
    yield f"{plan.steps:,} steps: {plan.steps * time.step / 3600:.1f} hours, {plan.hours:,.1f} GPU hours{price}"
    yield ""
    for what, parts in (("host memory of a node", plan.host.memory), ("disk", plan.host.disk)):
        listed = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts.items())
        yield f"{what}: {sum(parts.values()) / GB:.1f} GB ({listed})"
    yield ""
    yield "assumed"
    for sentence in plan.assumed.sentences():
        yield f"  {sentence}"


def _limit(plan: Plan) -> str:
    """Who is waited for, host or device, and what the device's time is limited by."""
    time = plan.time
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in sorted(time.limits.items(), key=lambda p: -p[1]))
    device = sum(time.limits.values())
    operations = f"{plan.micro_batches} x {time.launches:,} operations"
    if time.limit == "host":
        return f"the host decides: {time.host:.2f} s for {operations}; the device needs {device:.2f} ({parts})"
    return (
        f"the device decides, most of all its {time.limit}: {parts}; the host needs {time.host:.2f} s for {operations}"
    )


def fit_lines(found: Fit) -> Iterator[str]:
    """What is proposed, why, and what comes after it."""
    if found.best is None:
        yield f"nothing fits. {found.advice}"
        return
    for number, one in enumerate([found.best, *found.others]):
        layout = one.plan.layout
        title = "proposed" if number == 0 else f"runner-up {number}"
        held = "resident" if layout.resident else "partitioned"
        yield f"{title}: ep {layout.ep}, sp {layout.sp}, {held}, recompute {layout.recompute}"
        yield f"  {one.reason}"
        changes = " ".join(f"{key}={value}" for key, value in one.changes.items())
        yield f"  {changes or 'as the recipe is'}"
