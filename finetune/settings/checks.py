"""What no single key can tell: checks across sections. Each returns problems; none raises. Loads no torch."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import isfinite, lcm
from pathlib import Path

from finetune.architecture.families import Family, family, family_names
from finetune.config import RunConfig
from finetune.files.hubconfig import hub_config, read_family
from finetune.settings.attention import MASK_TOKENS
from finetune.settings.check_adapters import adapter_problems
from finetune.settings.check_context import context_problems
from finetune.settings.check_evaluation import eval_problems
from finetune.settings.check_media import media_problems, run_problems
from finetune.settings.check_rows import memory_problems, sequence_problems
from finetune.settings.check_schedule import schedule_problems, stage_problems
from finetune.settings.problems import ConfigError, Problem, did_you_mean
from finetune.settings.published import published_problems
from finetune.settings.stages import by_stage
from finetune.settings.typed import leaves, related
from moe.config import MoeConfig


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a check may look at; `base` is None when the model section itself is wrong."""

    config: RunConfig
    ranks: int
    base: Family | None
    resuming: bool = False  # the packs of a step are settled; ranks may have been lost or added


def fewest_ranks(config: RunConfig) -> int:
    """The smallest world that the recipe's layout allows."""
    return lcm(max(1, config.parallel.ep), *(max(1, sp) for sp in (config.parallel.sp, *_stage_sizes(config))))


def _stage_sizes(config: RunConfig) -> list[int]:
    """How many ranks share a row, in each stage that says so."""
    return [stage.sp for stage in config.stages.values() if stage.sp]


def base_family(config: RunConfig) -> Family:
    """The base model's shape, from the folder's own config.json when there is one, else from our table."""
    folder = Path(config.model.path)
    if config.model.path and (folder / "config.json").is_file():
        return read_family(folder)
    return family(config.model.family)


def cross_check(
    config: RunConfig, *, ranks: int | None, known: Collection[str] = (), resuming: bool = False
) -> list[Problem]:
    """Every problem across sections, less those about keys (or sections of keys) already known to be wrong."""
    problems = _model(config)
    base = None if problems else base_family(config)
    facts = Facts(config=config, ranks=ranks or max(1, fewest_ranks(config)), base=base, resuming=resuming)
    for check in CHECKS:
        problems += check(facts)
    return [problem for problem in problems if not any(related(problem.key, key) for key in known)]


def require(config: RunConfig, problems: list[Problem], *, ranks: int, resuming: bool = False) -> list[Problem]:
    """Raise one ConfigError with every problem, those of reading and those across sections; return mere warnings."""
    known = [problem.key for problem in problems]
    problems = problems + cross_check(config, ranks=ranks, known=known, resuming=resuming)
    if any(problem.level == "error" for problem in problems):
        raise ConfigError(problems)
    return problems


def _model(config: RunConfig) -> list[Problem]:
    """The base model is known, and folder and table agree."""
    name, path = config.model.family, config.model.path
    try:
        named = family(name) if name else None
    except ValueError:
        return [_problem("model.family", name, "not a known family", did_you_mean(name, family_names()))]
    if path and (Path(path) / "config.json").is_file():
        try:
            found = read_family(Path(path))
        except ValueError as error:
            return [_problem("model.path", path, str(error), "Name the folder of a Qwen3-VL base model")]
        theirs, ours = leaves(hub_config(found)), leaves(hub_config(named or found))
        unlike = [key for key in theirs | ours if theirs.get(key) != ours.get(key)]
        if unlike:
            listed = "; ".join(f"{key} is {theirs.get(key)}, not {ours.get(key)}" for key in unlike)
            return [_problem("model.family", name, f"{path}/config.json differs: {listed}", "Drop model.family")]
    elif named is None:
        remedy = f"Set model.family ({', '.join(family_names())}) or model.path to a folder with a config.json"
        return [_problem("model.path", path, "the shape of the base model is not known from it", remedy)]
    return []


def _ranges(facts: Facts) -> list[Problem]:
    """Numbers that have only a lower bound."""
    config = facts.config
    least: dict[str, tuple[float, float]] = {
        "data.packs_per_step": (config.data.packs_per_step, 1),
        "data.tokens_per_pack": (config.data.tokens_per_pack, 1),
        "parallel.ep": (config.parallel.ep, 0),  # 0 is auto
        "parallel.sp": (config.parallel.sp, 1),
        "parallel.tile_tokens": (config.parallel.tile_tokens, 0),
        **{f"stages.{name}.sp": (stage.sp, 0) for name, stage in config.stages.items()},
        "checkpoint.every_steps": (config.checkpoint.every_steps, 0),
        "checkpoint.keep": (config.checkpoint.keep, 1),
        "run.seed": (config.run.seed, 0),
        "track.load_every": (config.track.load_every, 0),
        "track.media_samples": (config.track.media_samples, 0),
        "run.idle_steps": (config.run.idle_steps, 1),
        "run.stall_seconds": (config.run.stall_seconds, 0),
    }
    problems = [
        _problem(key, value, f"at least {bound} is wanted", f"Set {key}={bound} or more")
        for key, (value, bound) in least.items()
        if not value >= bound
    ]
    positive = {"optim.lr": config.optim.lr}
    positive |= {f"data.sources.{name}.weight": source.weight for name, source in config.data.sources.items()}
    problems += [
        _problem(key, value, "a finite number above 0 is wanted", f"Set {key} to one")
        for key, value in positive.items()
        if not (isfinite(value) and value > 0)
    ]
    return problems


def _media(facts: Facts) -> list[Problem]:
    return [*media_problems(facts.config), *run_problems(facts.config)]


def _sources(facts: Facts) -> list[Problem]:
    if facts.config.data.sources:
        return []
    remedy = "Add data.sources.<name>.path=... (shards or a JSONL file)"
    return [_problem("data.sources", {}, "there is nothing to train on", remedy)]


def _steps_divide(facts: Facts) -> list[Problem]:
    """A micro-batch is one packed row, so the packs of a step must divide by the data ranks."""
    config = facts.config
    problems = _packs_divide(facts, "data.packs_per_step", config.data.packs_per_step, config.parallel.sp)
    for name, stage in config.stages.items():
        if stage.sp or stage.data.packs_per_step is not None:
            packs, sp = stage.data.packs_per_step or config.data.packs_per_step, stage.sp or config.parallel.sp
            problems += _packs_divide(facts, f"stages.{name}.data.packs_per_step", packs, sp)
    return problems


def _packs_divide(facts: Facts, key: str, packs: int, sp: int) -> list[Problem]:
    if packs < 1 or sp < 1 or facts.ranks % sp:
        return []
    ranks = facts.ranks // sp
    if packs % ranks == 0:
        return []
    if facts.resuming:
        share, full = -(-packs // ranks), ranks - (-packs % ranks)
        allowed = f"of {ranks} data ranks {full} take {share} packs a step, the others {share - 1} and an empty one"
        remedy = "The steps are those of before, only slower; a number of ranks that divides them wastes nothing"
        return [_problem(key, packs, allowed, remedy, warning=True)]
    below, above = packs // ranks * ranks, -(-packs // ranks) * ranks
    nearest = " or ".join(f"{key}={n}" for n in (below, above) if n)
    allowed = f"it must divide by the {ranks} data ranks, as each rank takes whole packed rows"
    return [_problem(key, packs, allowed, f"Nearest that do: {nearest}")]


def _expert_ranks(facts: Facts) -> list[Problem]:
    """Experts and ranks must both divide by the size of an expert-parallel group."""
    ep, base = facts.config.parallel.ep, facts.base
    if ep < 1:
        return []
    problems = []
    if facts.ranks % ep:
        fits = ", ".join(str(n) for n in _divisors(facts.ranks))
        problems.append(_problem("parallel.ep", ep, f"it must divide the {facts.ranks} ranks", f"One of {fits} does"))
    if base is None:
        return problems
    if base.text.experts is None:
        if ep > 1:
            problems.append(
                _problem("parallel.ep", ep, f"{base.name} is dense, it has no experts", "Set parallel.ep=1")
            )
    elif base.text.experts.num_experts % ep:
        fits = ", ".join(str(n) for n in _divisors(base.text.experts.num_experts))
        allowed = f"it must divide the {base.text.experts.num_experts} experts of {base.name}"
        problems.append(_problem("parallel.ep", ep, allowed, f"One of {fits} does"))
    return problems


def _long_rows(facts: Facts) -> list[Problem]:
    """Ranks that share rows, and what saves memory over long ones."""
    return [*sequence_problems(facts.config, facts.base, ranks=facts.ranks), *memory_problems(facts.config)]


def _context(facts: Facts) -> list[Problem]:
    config = facts.config
    rows = [config.data.tokens_per_pack, *(stage.data.tokens_per_pack or 0 for stage in config.stages.values())]
    return context_problems(config.context, facts.base, longest_row=max(rows))


def _balance(facts: Facts) -> list[Problem]:
    """The balance and z losses have coefficients that can be meant, and routers to act on."""
    moe, base, problems = facts.config.moe, facts.base, []
    for key, value in {"balance_coefficient": moe.balance_coefficient, "z_coefficient": moe.z_coefficient}.items():
        if not (isfinite(value) and value >= 0):
            problems.append(_problem(f"moe.{key}", value, "a finite number of 0 or more is wanted", "Set one"))
    if moe.balance != "off" and moe.balance_coefficient == 0:
        allowed = f"moe.balance={moe.balance} does nothing without a coefficient"
        remedy = "Set a number above 0 (1e-3 is usual), or moe.balance=off"
        problems.append(_problem("moe.balance_coefficient", 0.0, allowed, remedy))
    if moe.balance == "off" and moe.balance_coefficient != MoeConfig.balance_coefficient:
        remedy = "Set moe.balance=global, or leave the coefficient out"
        allowed = "moe.balance is off, so nothing reads it"
        problems.append(_problem("moe.balance_coefficient", moe.balance_coefficient, allowed, remedy))
    if base is not None and base.text.experts is None:
        problems += [
            _problem(key, found, f"{base.name} is dense, it has no router", f"Leave {key} out")
            for key, found in _terms(moe)
        ]
    return problems


def _adapters(facts: Facts) -> list[Problem]:
    """What trains is in the base; a loss on a router that does not train is worth a warning."""
    problems = adapter_problems(facts.config.adapters, facts.base)
    if facts.base is not None and facts.base.text.experts is not None:
        problems += frozen_router(facts.config.moe, router_trains=facts.config.adapters.router.mode != "frozen")
    return problems


def frozen_router(moe: MoeConfig, *, router_trains: bool) -> list[Problem]:
    """Warnings for losses on a router that does not train."""
    allowed = "the router is frozen, so its gradient can only move the hidden states that the router sees"
    remedy = "Train the router, or leave it off: the load is logged either way"
    return [] if router_trains else [_problem(key, found, allowed, remedy, warning=True) for key, found in _terms(moe)]


def _terms(moe: MoeConfig) -> list[tuple[str, object]]:
    """The keys that switch a loss on the router on, with their values."""
    terms: list[tuple[str, object]] = [("moe.balance", moe.balance)] if moe.balance != "off" else []
    return terms + ([("moe.z_coefficient", moe.z_coefficient)] if moe.z_coefficient else [])


def _attention(facts: Facts) -> list[Problem]:
    """sdpa's mask grows with the square of the packed row."""
    name = facts.config.model.attention
    tokens = max(tokens for _, tokens in by_stage(facts.config, "tokens_per_pack"))
    if name != "sdpa" or tokens <= MASK_TOKENS:
        return []
    allowed = f"it builds a mask of {tokens:,} x {tokens:,} for a packed row, and the limit is {MASK_TOKENS:,} tokens"
    return [_problem("model.attention", name, allowed, "Set model.attention=auto, which builds none")]


def _evaluation(facts: Facts) -> list[Problem]:
    return eval_problems(facts.config)


def _schedule(facts: Facts) -> list[Problem]:
    """Schedule and stages fit the run, and what learns how fast is within what others found to work."""
    problems = [*schedule_problems(facts.config), *stage_problems(facts.config)]
    return problems or list(published_problems(facts.config, facts.base))


CHECKS: tuple[Callable[[Facts], list[Problem]], ...] = (
    _ranges,
    _media,
    _sources,
    _steps_divide,
    _expert_ranks,
    _long_rows,
    _context,
    _balance,
    _adapters,
    _attention,
    _evaluation,
    _schedule,
)


def _problem(key: str, found: object, allowed: str, remedy: str, *, warning: bool = False) -> Problem:
    return Problem(key=key, found=found, allowed=allowed, remedy=remedy, level="warning" if warning else "error")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
