"""What is wrong with the ranks that share rows, and with what saves memory over long ones. Loads no torch."""

from finetune.architecture.families import Family
from finetune.config import RunConfig
from finetune.settings.problems import Problem


def sequence_problems(config: RunConfig, base: Family | None, *, ranks: int) -> list[Problem]:
    """A row's slices need whole groups of ranks, and each rank of a group some heads of its own."""
    problems = []
    sizes = {"parallel.sp": config.parallel.sp}
    sizes |= {f"stages.{name}.sp": stage.sp for name, stage in config.stages.items() if stage.sp}
    for key, sp in sizes.items():
        if sp > 1 and ranks % sp:
            fits = ", ".join(str(n) for n in _divisors(ranks))
            allowed = f"it must divide the {ranks} ranks, as each group of so many holds one row"
            problems.append(_problem(key, sp, allowed, f"One of {fits} does"))
        if sp > 1 and base is not None and base.text.num_attention_heads % sp:
            heads = base.text.num_attention_heads
            fits = ", ".join(str(n) for n in _divisors(heads))
            allowed = f"it must divide the {heads} attention heads of {base.name}, of which each rank takes its share"
            problems.append(_problem(key, sp, allowed, f"One of {fits} does"))
    return problems


def memory_problems(config: RunConfig) -> list[Problem]:
    """Options that save memory act on what is recomputed, and on rows that are exchanged tile by tile."""
    parallel, problems = config.parallel, []
    if parallel.offload_activations and parallel.recompute == "none":
        allowed = "parallel.recompute is none, so each layer keeps everything, too much for the host"
        problems.append(_problem("parallel.offload_activations", True, allowed, "Set parallel.recompute=layer"))
    if parallel.tile_tokens and config.moe.dispatch == "deepep":
        allowed = "moe.dispatch=deepep exchanges a micro-batch at once"
        problems.append(_problem("parallel.tile_tokens", parallel.tile_tokens, allowed, "Set moe.dispatch=all_to_all"))
    return problems


def _problem(key: str, found: object, allowed: str, remedy: str) -> Problem:
    return Problem(key=key, found=found, allowed=allowed, remedy=remedy)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
