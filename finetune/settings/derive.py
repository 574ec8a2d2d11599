"""Derives numbers from a configuration, each with a sentence that explains it. Loads no torch."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby

from data.format.printable import count_of, size_of
from finetune.architecture.rank_shares import rank_shares
from finetune.architecture.shapes import active_text_parameters, parameter_counts, parameter_shapes
from finetune.architecture.trained import trained_tensors
from finetune.architecture.yarn import extended_rope, extension, rotary, serving_lines
from finetune.config import RunConfig
from finetune.settings.checks import base_family, fewest_ranks
from finetune.settings.stages import run_stages


@dataclass(frozen=True, kw_only=True)
class Derived:
    """One number, its name for programs, and the sentence that derives it."""

    name: str
    value: int | float
    text: str


def derive(config: RunConfig, *, ranks: int | None, reads: bool = False) -> list[Derived]:
    """Return every number that follows from a valid configuration; with `reads`, also the bytes each rank loads."""
    count = ranks or fewest_ranks(config)
    return [
        *_ranks(config, ranks),
        *_step(config, count),
        *_stages(config),
        *_model(config),
        *_trained(config),
        *_context(config),
        *_mixture(config),
        *(_reads(config, count) if reads and config.parallel.ep else ()),
    ]


def _ranks(config: RunConfig, ranks: int | None) -> list[Derived]:
    count, ep = ranks or fewest_ranks(config), config.parallel.ep
    origin = "--ranks" if ranks else "the fewest that this recipe allows; set another number with --ranks N"
    spread = (
        f"{count_of(count // ep, 'expert-parallel group')} of {ep}"
        if ep
        else "parallel.ep is chosen when the run starts"
    )
    groups = f"{count} ranks ({origin}): {spread}"
    sp, tokens = config.parallel.sp, config.data.tokens_per_pack
    lines = [Derived(name="data_ranks", value=count // sp, text=groups)]
    if sp > 1:
        each = -(-tokens // sp)
        text = f"{count_of(count // sp, 'sequence group')} of {sp}: a row of {tokens:,} tokens is {each:,} on each rank"
        lines.append(Derived(name="tokens_per_rank", value=each, text=text))
    return lines


def _step(config: RunConfig, ranks: int) -> list[Derived]:
    packs, tokens = config.data.packs_per_step, config.data.tokens_per_pack
    ranks //= config.parallel.sp
    micro = -(-packs // ranks)  # uneven only if a run resumes with another number of ranks
    rows = f"each one packed row ({micro * ranks - packs} of them empty)" if packs % ranks else "each one packed row"
    epochs, steps = config.schedule.epochs, config.schedule.steps
    text = f"steps = those of {epochs:g} epochs" + (f" = {steps:,}" if steps else ", known when the shards are indexed")
    return [
        *([Derived(name="steps", value=steps, text=text)] if epochs else ()),
        Derived(
            name="tokens_per_step",
            value=packs * tokens,
            text=f"tokens per step = {packs} packs x {tokens:,} = {packs * tokens:,}",
        ),
        Derived(
            name="micro_batches_per_rank",
            value=micro,
            text=f"micro-batches per step = {packs} packs / {ranks} data ranks = {micro} per rank, {rows}",
        ),
    ]


def _stages(config: RunConfig) -> list[Derived]:
    """Return a line for each stage: its steps, its trained parts with peak rates, and its tokens per step."""
    lines = []
    for stage in run_stages(config) if config.stages else ():
        trains = ", ".join(f"{name} at {peak:.3g}" for name, peak in stage.peaks.items())
        packs, tokens = stage.data.packs_per_step, stage.data.tokens_per_pack
        steps = f"steps {stage.first} to {stage.end - 1}" if stage.end else f"from step {stage.first} on"
        text = (
            f"stage {stage.name or '(before the first)'}: {steps} train {trains}; "
            f"{packs} packs x {tokens:,} = {packs * tokens:,} tokens per step"
            + (f", each row shared by {stage.sp} ranks" if stage.sp > 1 else "")
        )
        lines.append(Derived(name=f"stage.{stage.name}", value=stage.steps, text=text))
    return lines


def _model(config: RunConfig) -> list[Derived]:
    base = base_family(config)
    counts = parameter_counts(base)
    total, active = counts.total, active_text_parameters(base)
    parts = " + ".join(f"{name} {count:,}" for name, count in asdict(counts).items() if count)
    lines = [
        Derived(name="parameters", value=total, text=f"parameters of {base.name} = {parts} = {total:,}"),
        Derived(name="active", value=active, text=f"of these, one text token passes through {active:,}"),
        Derived(
            name="bf16_bytes",
            value=2 * total,
            text=f"weights in bfloat16 = 2 bytes x {total:,} = {size_of(2 * total)}",
        ),
    ]
    if base.text.experts is not None and config.parallel.ep:
        number, ep = base.text.experts.num_experts, config.parallel.ep
        local = number // ep
        text = f"experts per rank = {number} / ep {ep} = {local} in each of {len(base.moe_layers)} layers"
        lines.append(Derived(name="experts_per_rank", value=local, text=text))
    return lines


def _trained(config: RunConfig) -> list[Derived]:
    """Return the trained parameters, their share of the base, and without stages the peak rate of each part."""
    base, by_part = base_family(config), Counter[str]()
    for tensor in trained_tensors(base, config.adapters, ep=1):
        by_part[tensor.part] += tensor.elements
    total, of = by_part.total(), parameter_counts(base).total
    parts = " + ".join(f"{part} {count:,}" for part, count in by_part.items())
    text = f"trained parameters = {parts} = {total:,}, {total / of:.2%} of the base's {of:,}"
    return [Derived(name="trained", value=total, text=text), *(() if config.stages else _rates(config))]


def _rates(config: RunConfig) -> Iterator[Derived]:
    for part, peak in run_stages(config)[0].peaks.items():
        section = getattr(config.adapters, part)
        form = f"lora with r {section.r}" if section.mode == "lora" else "in full"
        key = f"adapters.{part}.lr" if section.lr else "optim.lr"
        text = f"highest learning rate of {part}, {form}: {peak:g} ({key})"
        yield Derived(name=f"lr.{part}", value=peak, text=text)


def _context(config: RunConfig) -> list[Derived]:
    base = base_family(config)
    extended = extension(config.context, base)
    if extended is None:
        return []
    scaling = rotary(extended_rope(base.text.rope, extended), base.text.head_dim).scaling
    lines = [
        Derived(
            name="context_positions",
            value=int(extended.original * extended.factor),
            text=f"yarn reaches position {extended.original:,} x {extended.factor:g} = "
            f"{int(extended.original * extended.factor):,}; config.json will say {extended.length:,} tokens",
        ),
        Derived(
            name="attention_scaling",
            value=scaling,
            text=f"queries and keys are scaled by 0.1 ln {extended.factor:g} + 1 = {scaling:.6f}",
        ),
    ]
    serving = enumerate(serving_lines(base, extended))
    return [*lines, *(Derived(name=f"serving.{number}", value=extended.length, text=text) for number, text in serving)]


def _mixture(config: RunConfig) -> list[Derived]:
    if config.data.mixture == "natural":
        return []  # shares follow from the data: every sample once per epoch
    total, unit = sum(source.weight for source in config.data.sources.values()), config.data.mixture
    return [
        Derived(
            name=f"share.{name}",
            value=source.weight / total,
            text=f"share of {name} = {source.weight:g} / {total:g} = {source.weight / total:.1%} of {unit}",
        )
        for name, source in config.data.sources.items()
    ]


def _reads(config: RunConfig, ranks: int) -> list[Derived]:
    """Return the bytes of frozen weights that ranks read in bfloat16, both ways; equal neighbours share a line."""
    shapes = parameter_shapes(base_family(config))
    lines = []
    for way in ("resident", "partitioned"):
        shares = rank_shares(
            shapes, world_size=ranks, ep_size=config.parallel.ep, itemsize=2, resident=way == "resident"
        )
        for (read, kept), group in groupby(shares, key=lambda share: (share.read, share.kept)):
            alike = [share.rank for share in group]
            readers = f"rank {alike[0]}" if len(alike) == 1 else f"each of ranks {alike[0]} to {alike[-1]}"
            text = f"loading, {way}: {readers} reads {read:,} bytes and keeps {kept:,}"
            lines.append(Derived(name=f"reads.{way}.{alike[0]}", value=read, text=text))
        total, largest = sum(share.read for share in shares), shares[0].largest
        text = f"loading, {way}: all ranks together read {total:,} bytes, each once; the largest tensor has {largest:,}"
        lines.append(Derived(name=f"reads.{way}.total", value=total, text=text))
    return lines
