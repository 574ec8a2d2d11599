"""`gpu-step`: full steps of layers of the 30B model on packed rows, compared with transformers and PEFT."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.device import Profiled, allocated, peak_of, profiled, synchronise
from benchmarks.gpu.material import even_row, full_row, renderer, write_sides
from benchmarks.gpu.misses import first_predicted
from benchmarks.gpu.parts import Skipped
from benchmarks.gpu.sides import Trainer, ours, peer
from benchmarks.gpu.sizes import Sizes, StepCase
from benchmarks.harness.figure import Figure, Peer
from benchmarks.harness.measure import OutputsDiffer, Side, spread, take_turns
from benchmarks.harness.rows import useful
from benchmarks.harness.spawned import on_ranks
from data.stream.batch import Batch
from finetune.config import RunConfig
from finetune.ranks.engine import start_distributed
from finetune.settings.recipes import load_recipe

RELATIVE = {"loss": 5e-3, "grad_norm": 1e-1}
"""Allowed relative difference of a step: in bfloat16, experts with nearly equal scores swap places."""
COUNTS = ("useful_tokens", "supervised_tokens", "row_tokens", "samples", "images")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The measurements of one side."""

    name: str
    seconds: tuple[float, ...]
    peak: int
    seen: Profiled


def run(sizes: Sizes) -> Iterator[Figure]:
    """Yield the figures of each case, compared with plain torch and, for the first case, with ZeRO-3 too."""
    for number, case in enumerate(first_predicted(sizes.steps, sizes, gpus=1)):
        # each case runs in its own process, because no engine releases all its memory
        facts, sides = on_ranks(1, beside, sizes, case, number == 0, accelerator=sizes.device)[0]
        yield from figures(sizes, case, facts, sides)


def run_whole(sizes: Sizes) -> Iterator[Figure]:
    """Yield the same with all layers, one side at a time, because two models of 61 GB do not fit together."""
    if sizes.device == "cuda":
        there = torch.cuda.get_device_properties(0).total_memory
        if there < sizes.whole_bytes:
            raise Skipped(f"all layers need {sizes.whole_bytes / 1e9:.0f} GB, and this GPU has {there / 1e9:.0f}")
    for number, case in enumerate(first_predicted(sizes.whole, sizes, gpus=1, whole=True)):
        with tempfile.TemporaryDirectory() as name:
            adapter = Path(name) / "adapter"
            (our_side,) = on_ranks(1, alone, sizes, case, adapter, None, accelerator=sizes.device)
            both = [our_side]
            if number == 0:
                both += on_ranks(1, alone, sizes, case, adapter, our_side[1], accelerator=sizes.device)
        yield from figures(sizes, case, our_side[2], [side[0] for side in both], in_turns=False)


def run_ranks(sizes: Sizes) -> Iterator[Figure]:
    """Yield the same on all GPUs, for our side only."""
    if sizes.world < 2:
        raise Skipped("one GPU: this part needs at least two")
    for case in first_predicted(sizes.ranks, sizes, gpus=sizes.world):
        ranks = on_ranks(sizes.world, alone, sizes, case, None, None, accelerator=sizes.device)
        slowest = max((rank[0] for rank in ranks), key=lambda rank: median(rank.seconds))
        facts = ranks[0][2] | {key: sum(rank[2][key] for rank in ranks) for key in COUNTS}
        yield from figures(sizes, case, facts, [slowest], in_turns=False)


def run_liger(sizes: Sizes) -> Iterator[Figure]:
    """Yield the peer with Liger's kernels compared with itself; in its own process, as Liger patches transformers."""
    if find_spec("liger_kernel") is None:
        raise Skipped("liger_kernel is neither installed on this machine nor in the kit")
    start_distributed()
    case = sizes.steps[0]
    with tempfile.TemporaryDirectory() as name:
        base, config, rows = prepare(Path(name), sizes, case)
        ours(base, config).write(Path(name) / "adapter")
        plain = peer(base, Path(name) / "adapter", config)
        step = plain.step(rows)
        fast = peer(base, Path(name) / "adapter", config, liger=True)
        same_step(fast.name, fast.step(rows), plain.name, step)
        yield from figures(sizes, case, facts_of(rows), in_turns([fast, plain], rows, sizes.rounds, [0, 0]))


def beside(sizes: Sizes, case: StepCase, zero3: bool) -> tuple[dict[str, Any], list[Measured]]:
    """Build the sides with one adapter, compare one step of each, then time them in turns."""
    start_distributed()
    with tempfile.TemporaryDirectory() as name:
        base, config, rows = prepare(Path(name), sizes, case)
        before = allocated()
        sides = [ours(base, config)]
        first = _begun(sides[0], rows, Path(name) / "adapter")
        sizes_of = [allocated() - before]
        for with_zero3 in (False, True)[: 1 + zero3]:
            before = allocated()
            sides.append(peer(base, Path(name) / "adapter", config, zero3=with_zero3))
            same_step(sides[0].name, first, sides[-1].name, sides[-1].step(rows))
            sizes_of.append(allocated() - before)
        others = [sum(sizes_of) - size for size in sizes_of]
        return facts_of(rows), in_turns(sides, rows, sizes.rounds, others)


def alone(
    sizes: Sizes, case: StepCase, adapter: Path | None, our_step: dict[str, float] | None
) -> tuple[Measured, dict[str, float], dict[str, Any]]:
    """Measure one side alone: ours, which writes `adapter`, or with `our_step` the peer, which starts from it."""
    start_distributed()
    with tempfile.TemporaryDirectory() as name:
        base, config, rows = prepare(Path(name), sizes, case)
        if our_step is None:
            side = ours(base, config)
            first = _begun(side, rows, adapter)
        else:
            assert adapter is not None
            side = peer(base, adapter, config)
            first = side.step(rows)
            same_step("moetune", our_step, side.name, first)
        return in_turns([side], rows, sizes.rounds, [0])[0], first, facts_of(rows)


def _begun(side: Trainer, rows: Sequence[Batch], adapter: Path | None) -> dict[str, float]:
    """Take a step, so that no factor is zero and every gradient matters; write the adapter; take another step."""
    side.step(rows)
    if adapter is not None:
        side.write(adapter)
    return side.step(rows)


def prepare(folder: Path, sizes: Sizes, case: StepCase) -> tuple[Path, RunConfig, list[Batch]]:
    """Write the base's folder without weights, read the case's recipe, and pack this rank's rows."""
    model = replace(sizes.model, layers=case.layers)
    base = write_sides(folder / "base", model)
    recipe, words = ("", case.words) if "=" in case.words[0] else (case.words[0], case.words[1:])
    config, problems = load_recipe(recipe, [*words, f"model.path={base}", 'model.family=""'])
    wrong = [str(problem) for problem in problems if problem.level == "error"]
    if wrong:
        raise ValueError(f"{case.name}: {'; '.join(wrong)}")
    made, (rank, world) = renderer(base), (dist.get_rank(), dist.get_world_size())
    numbers = range(rank, config.data.packs_per_step, world)
    tokens = config.data.tokens_per_pack
    if case.assumed is not None:
        return base, config, [even_row(made, tokens, number, case.assumed) for number in numbers]
    return base, config, [full_row(made, tokens, number) for number in numbers]


def same_step(name: str, step: dict[str, float], other: str, other_step: dict[str, float]) -> None:
    """Raise if the sides' losses or gradient norms of the same step differ."""
    for key, value in other_step.items():
        print(f"{key}: {name} {step[key]:.6g}, {other} {value:.6g}", flush=True)
        if not abs(step[key] - value) <= RELATIVE[key] * abs(value):
            raise OutputsDiffer(f"{key} is {step[key]:.6g} for {name} and {value:.6g} for {other}")


def in_turns(
    sides: Sequence[Trainer], rows: Sequence[Batch], rounds: int, others_bytes: Sequence[int]
) -> list[Measured]:
    """Time the sides in turns; then measure the memory of each, without that of the others, and profile a step."""
    runs = [Side(name=side.name, run=partial(side.step, rows)) for side in sides]
    times = take_turns(runs, rounds=rounds, warmup=0, synchronise=synchronise)  # each has stepped already
    peaks = [peak_of(side) - other for side, other in zip(runs, others_bytes, strict=True)]
    return [
        Measured(name=side.name, seconds=seconds, peak=peak, seen=profiled(side))
        for side, seconds, peak in zip(runs, times, peaks, strict=True)
    ]


def facts_of(rows: Sequence[Batch]) -> dict[str, Any]:
    """Return the facts about this rank's rows."""
    return {
        "gpus": dist.get_world_size(),
        "useful_tokens": useful(rows),
        "row_tokens": sum(row.input_ids.numel() for row in rows),
        "supervised_tokens": sum(int((row.loss_weights > 0).sum()) for row in rows),
        "samples": sum(len(row.keys) for row in rows),
        "images": sum(len(row.image_grids) for row in rows),
    }


def figures(
    sizes: Sizes, case: StepCase, facts: dict[str, Any], sides: Sequence[Measured], *, in_turns: bool = True
) -> Iterator[Figure]:
    """Yield tokens per second, peak memory, device and host time of the first side, compared with each other side."""
    first = sides[0]
    config = {
        "case": case.name,
        "words": list(case.words),
        "layers": case.layers,
        "gpu": sizes.gpu,
        "sizes": sizes.name,
        "vocabulary": sizes.model.vocabulary,
        "weights": "drawn on the device",
        "in_turns": in_turns,
        **facts,
        "assumed": case.assumed and asdict(case.assumed),
        "kernels_ms": {name[:100]: round(1e3 * seconds, 3) for name, seconds in list(first.seen.kernels.items())[:15]},
    }
    tokens = facts["useful_tokens"]
    what: list[tuple[str, str, Callable[[Measured], float]]] = [
        ("useful tokens/s", "tokens/s", lambda side: tokens / median(side.seconds)),
        ("peak memory", "bytes", lambda side: side.peak),
        ("device time of a step, sum of kernels", "ms", lambda side: 1e3 * side.seen.device),
        ("host time of a profiled step, without its waits", "ms", lambda side: 1e3 * side.seen.host),
    ]
    for metric, unit, value in what:
        if metric == "peak memory" and sizes.device == "cpu":
            continue  # not counted there
        figure = Figure(
            f"{metric}, {case.name}",
            value(first),
            unit,
            config=config,
            n=sizes.rounds,
            better="higher" if unit == "tokens/s" else "lower",
            spread={"ours": spread(first.seconds)},
        )
        if len(sides) == 1:
            yield figure
        for other in sides[1:]:
            shown = {**figure.spread, "peer": spread(other.seconds)}
            yield replace(figure, peer=Peer(other.name, value(other)), spread=shown)
