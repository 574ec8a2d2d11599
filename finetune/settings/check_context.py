"""Checks the `context:` section. Loads no torch."""

import math

from finetune.architecture.families import Family
from finetune.architecture.yarn import extension
from finetune.config import ContextConfig
from finetune.settings.problems import Problem, problem

USUAL_FACTOR = 3.0
"""The highest usual factor: the authors' for a million tokens, as positions grow more slowly than tokens."""


def context_problems(config: ContextConfig, base: Family | None, *, longest_row: int) -> list[Problem]:
    """Return the errors and warnings of the `context:` section."""
    problems = []
    factor, length = config.yarn.factor, config.length
    if factor is not None and not (math.isfinite(factor) and factor > 1):
        allowed = "it must be a factor above 1, by which positions are stretched"
        problems.append(problem("context.yarn.factor", factor, allowed, "Leave it out for the base's own context"))
    elif factor is not None and factor > USUAL_FACTOR:
        allowed = "positions grow more slowly than tokens, so that the authors use only 2 or 3 for a million tokens"
        problems.append(problem("context.yarn.factor", factor, allowed, "Set 2 or 3", warning=True))
    if length is not None and length < 1:
        problems.append(problem("context.length", length, "it must be at least 1", "Leave it out for the default"))
    if base is None or problems:
        return problems
    native = base.text.max_position_embeddings
    extended = extension(config, base)
    if length is not None and length > native and extended is None:
        allowed = f"{base.name} was trained for {native:,} positions, and nothing stretches them"
        remedy = f"Set context.yarn.factor={min(3, math.ceil(length / native))}, or leave context.length out"
        problems.append(problem("context.length", length, allowed, remedy))
    if extended is None and length is not None and length < native:
        allowed = f"{base.name} serves {native:,} positions; a shorter context changes nothing in training"
        problems.append(problem("context.length", length, allowed, "Leave it out, or set data.tokens_per_pack"))
    limit = extended.length if extended else native
    if longest_row > limit:
        allowed = f"a pack is longer than the context of {base.name}, {limit:,} tokens"
        remedy = f"A sample as long as the pack would exceed it: set {limit} or less, or set context.yarn.factor"
        problems.append(problem("data.tokens_per_pack", longest_row, allowed, remedy, warning=True))
    return problems
