"""Checks sequence parallelism and the options that save memory for long rows. Loads no torch."""

from finetune.architecture.families import Family
from finetune.config import RunConfig
from finetune.settings.problems import Problem, divisors, problem


def sequence_problems(config: RunConfig, base: Family | None, *, ranks: int) -> list[Problem]:
    """Return the sizes of sequence groups that do not divide the ranks, or the attention heads."""
    problems = []
    sizes = {"parallel.sp": config.parallel.sp}
    sizes |= {f"stages.{name}.sp": stage.sp for name, stage in config.stages.items() if stage.sp}
    for key, sp in sizes.items():
        if sp > 1 and ranks % sp:
            problems.append(problem(key, sp, *divides_the_ranks(key, sp, ranks)))
        if sp > 1 and base is not None and base.text.num_attention_heads % sp:
            heads = base.text.num_attention_heads
            allowed = f"it must divide the {heads} attention heads of {base.name}, which the ranks divide among them"
            problems.append(problem(key, sp, allowed, f"Use one of {divisors(heads)}"))
    return problems


def divides_the_ranks(key: str, size: int, ranks: int) -> tuple[str, str]:
    """Return what a size of groups must divide, and a remedy: sizes and a number of ranks that fit."""
    nearest = -(-ranks // size) * size
    remedy = f"Set {key} to one of {divisors(ranks)}" if ranks > 1 else f"Set {key}=1"
    return f"it must divide the number of ranks, {ranks}", f"{remedy}, or start {nearest} ranks (--ranks {nearest})"


def memory_problems(config: RunConfig) -> list[Problem]:
    """Return memory-saving options that have no effect: without recompute, or with rows exchanged all at once."""
    parallel, problems = config.parallel, []
    if parallel.offload_activations and parallel.recompute == "none":
        allowed = "with parallel.recompute=none each layer keeps everything, which is too much for the host"
        problems.append(problem("parallel.offload_activations", True, allowed, "Set parallel.recompute=layer"))
    if parallel.tile_tokens and config.moe.dispatch == "deepep":
        allowed = "moe.dispatch=deepep exchanges a complete micro-batch at once"
        problems.append(problem("parallel.tile_tokens", parallel.tile_tokens, allowed, "Set moe.dispatch=all_to_all"))
    return problems
