"""Published values for this model and similar ones, with sources; `moetune check` warns about values outside them.

Sources: the authors' qwen-vl-finetune (full tuning: language 2e-7 to 1e-6, tower 1e-6, merger 1e-5, batches of 4 x 4 x
8 GPUs; LoRA: 2e-5 with r 64, alpha 16); ms-swift's best practice for Qwen3-VL (LoRA: 1e-4 with r 8, alpha 32; full
tuning 1e-5; global batch 4 for the 30B); LLaVA-1.5 (merger alone 1e-3, then all 2e-5); Schulman et al., "LoRA Without
Regret", 2025 (LoRA ten times the rate of full tuning, r 1 to 512, and small batches). All are for bases from 2B.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from finetune.architecture.families import Family
from finetune.architecture.shapes import parameter_counts
from finetune.config import RunConfig
from finetune.settings.problems import Problem, problem
from finetune.settings.stages import run_stages, trained_parts

SMALLEST = 1_000_000_000
"""Smaller bases are toys, for which no values were published."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """The range from the lowest to the highest published value."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Return whether a value is inside the range."""
        return self.low * 0.999 <= value <= self.high * 1.001


LORA_LR = Range(low=2e-5, high=5e-4)  # authors' LoRA; ten times the full rates that LoRA Without Regret sweeps
LORA_LR_OF = {"vision_blocks": Range(low=1e-5, high=5e-4)}  # ten times the authors' full rate for the tower, 1e-6
FULL_LR = Range(low=2e-7, high=2e-5)  # authors; LLaVA-1.5's second stage
FULL_LR_OF = {
    "merger": Range(low=1e-6, high=1e-3),  # authors 1e-5; LLaVA-1.5's first stage 1e-3
    "deepstack_mergers": Range(low=1e-6, high=1e-3),
    "vision_blocks": Range(low=2e-7, high=1e-5),  # authors 1e-6
    "patch_embed": Range(low=2e-7, high=1e-5),
    "pos_embed": Range(low=2e-7, high=1e-5),
}
RANK = Range(low=1, high=512)
SCALE = Range(low=0.25, high=4.0)  # alpha / r: the authors' 16 / 64, ms-swift's 32 / 8
PACKS = Range(low=4, high=512)  # ms-swift's script for the 30B; the authors' 4 x 4 on each of 8 to 32 GPUs


def published_problems(config: RunConfig, base: Family | None) -> Iterator[Problem]:
    """Yield a warning for each key whose value is outside the published range, with all parts that it concerns."""
    if base is None or not config.optim.lr > 0 or parameter_counts(base).total < SMALLEST:
        return
    counts = asdict(parameter_counts(base))
    parts = [part for part in trained_parts(config) if counts[part]]
    rates: dict[tuple[str, float], list[str]] = {}
    for part in parts:
        for key, rate in _rates(config, part):
            is_lora = getattr(config.adapters, part).mode == "lora"
            published = LORA_LR_OF.get(part, LORA_LR) if is_lora else FULL_LR_OF.get(part, FULL_LR)
            if not published.holds(rate):
                kind = f"LoRA on {part}" if is_lora else f"full tuning of {part}"
                rates.setdefault((key, rate), []).append(f"{published.low:g} to {published.high:g} for {kind}")
    for (key, rate), lines in rates.items():
        own = key if key.startswith("adapters.") else "adapters.<part>.lr"
        yield problem(
            key, rate, f"published rates are {', '.join(lines)}", f"Set {own} within them, or be sure", warning=True
        )
    for part in parts:
        yield from _ranks(part, getattr(config.adapters, part))
    if not PACKS.holds(config.data.packs_per_step):
        allowed = f"published batches are {PACKS.low:g} to {PACKS.high:g} rows"
        yield problem("data.packs_per_step", config.data.packs_per_step, allowed, "16 to 128 are usual", warning=True)


def _rates(config: RunConfig, part: str) -> dict[tuple[str, float], None]:
    """Return each peak rate that a part has in a stage, with the key that sets it."""
    own = f"adapters.{part}.lr" if getattr(config.adapters, part).lr else "optim.lr"
    return dict.fromkeys(
        (f"stages.{stage.name}.lr" if stage.name and config.stages[stage.name].lr else own, stage.peaks[part])
        for stage in run_stages(config)
        if part in stage.peaks
    )


def _ranks(part: str, section: Any) -> Iterator[Problem]:
    """Yield warnings about the rank and the scale of a part with LoRA."""
    if section.mode != "lora" or getattr(section, "r", 0) < 1:
        return
    scale = section.alpha / section.r
    if not RANK.holds(section.r):
        allowed = f"published ranks are {RANK.low:g} to {RANK.high:g}"
        yield problem(f"adapters.{part}.r", section.r, allowed, "8 to 64 are usual", warning=True)
    if not getattr(section, "rslora", False) and not SCALE.holds(scale):
        allowed = f"published alpha / r are {SCALE.low:g} to {SCALE.high:g}, this is {scale:g}"
        yield problem(
            f"adapters.{part}.alpha", section.alpha, allowed, f"Twice r, {2 * section.r}, is usual", warning=True
        )
