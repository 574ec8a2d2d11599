"""Checks across sections of the configuration. Each check returns problems; none raises. Loads no torch."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite, lcm
from pathlib import Path

from data.checks import data_problems
from finetune.architecture.families import Family, family, family_names
from finetune.config import RunConfig
from finetune.files.hubconfig import hub_config, read_family
from finetune.settings.attention import MASK_TOKENS
from finetune.settings.check_adapters import adapter_problems, quantise_problems
from finetune.settings.check_context import context_problems
from finetune.settings.check_evaluation import eval_problems
from finetune.settings.check_media import media_problems, run_problems
from finetune.settings.check_rows import divides_the_ranks, memory_problems, sequence_problems
from finetune.settings.check_schedule import schedule_problems, stage_problems
from finetune.settings.problems import ConfigError, Problem, did_you_mean, divisors, problem
from finetune.settings.published import published_problems
from finetune.settings.stages import by_stage
from finetune.settings.typed import leaves, related
from moe.config import MoeConfig


@dataclass(frozen=True, kw_only=True)
class CheckInput:
    """The input of a check; `base` is None when the model section itself is wrong."""

    config: RunConfig
    ranks: int
    base: Family | None
    resuming: bool = False  # the packs per step stay the same, but the number of ranks may have changed


def fewest_ranks(config: RunConfig) -> int:
    """Return the smallest number of ranks that the recipe's `parallel:` allows."""
    stages = (stage.sp for stage in config.stages.values())
    return lcm(*(max(1, size) for size in (config.parallel.ep, config.parallel.sp, *stages)))


def base_family(config: RunConfig) -> Family:
    """Return the base model's shape from the folder's config.json if there is one, else from our table."""
    folder = Path(config.model.path)
    if config.model.path and (folder / "config.json").is_file():
        return read_family(folder)
    return family(config.model.family)


def cross_check(
    config: RunConfig, *, ranks: int | None, known: Collection[str] = (), resuming: bool = False
) -> list[Problem]:
    """Return every problem across sections, except for keys or sections already known to be wrong."""
    problems = _model(config)
    base = None if problems else base_family(config)
    run = CheckInput(config=config, ranks=ranks or max(1, fewest_ranks(config)), base=base, resuming=resuming)
    for check in CHECKS:
        problems += check(run)
    return [wrong for wrong in problems if not any(related(wrong.key, key) for key in known)]


def require(
    config: RunConfig, problems: list[Problem], *, ranks: int | None, resuming: bool = False, starts: bool = False
) -> list[Problem]:
    """Raise one ConfigError with all problems, of reading and across sections; if there are only warnings, return them.

    `starts`: the run starts on this machine, so that the packages it needs must be installed.
    """
    known = [wrong.key for wrong in problems]
    problems = problems + cross_check(config, ranks=ranks, known=known, resuming=resuming)
    problems += missing_packages(config) if starts else []
    if any(wrong.level == "error" for wrong in problems):
        raise ConfigError(problems)
    return problems


def missing_packages(config: RunConfig) -> list[Problem]:
    """Return the keys that need a package which is not installed."""
    if not config.track.tensorboard or find_spec("tensorboard") is not None:
        return []
    remedy = "Run `pip install 'moetune[tensorboard]'`, or set track.tensorboard=false: metrics.jsonl has everything"
    return [problem("track.tensorboard", True, "the package tensorboard is not installed", remedy)]


def _model(config: RunConfig) -> list[Problem]:
    """Return why the base model is unknown, or the differences between its folder and our table."""
    name, path = config.model.family, config.model.path
    try:
        named = family(name) if name else None
    except ValueError:
        return [problem("model.family", name, "it must be a known model family", did_you_mean(name, family_names()))]
    if path and (Path(path) / "config.json").is_file():
        try:
            here = read_family(Path(path))
        except ValueError as error:
            return [problem("model.path", path, str(error), "Name the folder of a Qwen3-VL base model")]
        in_folder, in_table = leaves(hub_config(here)), leaves(hub_config(named or here))
        unlike = [key for key in in_folder | in_table if in_folder.get(key) != in_table.get(key)]
        if unlike:
            listed = "; ".join(f"{key} is {in_folder.get(key)}, not {in_table.get(key)}" for key in unlike)
            return [problem("model.family", name, f"{path}/config.json differs: {listed}", "Set model.family=null")]
    elif named is None:
        remedy = f"Set model.family ({', '.join(family_names())}) or model.path to a folder with a config.json"
        allowed = "it must be a folder with a config.json, unless model.family names the base"
        return [problem("model.path", path, allowed, remedy)]
    return []


def _data(run: CheckInput) -> list[Problem]:
    """Return the problems of the data section, which `data` checks itself."""
    return data_problems(run.config.data)


def _ranges(run: CheckInput) -> list[Problem]:
    """Return numbers below their least value, and an impossible learning rate."""
    config = run.config
    least: dict[str, tuple[float, float]] = {
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
        problem(key, value, f"it must be at least {bound}", f"Set {key}={bound} or more")
        for key, (value, bound) in least.items()
        if not value >= bound
    ]
    lr = config.optim.lr
    if not (isfinite(lr) and lr > 0):
        problems.append(problem("optim.lr", lr, "it must be a finite number above 0", "Set another optim.lr"))
    return problems


def _media(run: CheckInput) -> list[Problem]:
    return [*media_problems(run.config), *run_problems(run.config)]


def _steps_divide(run: CheckInput) -> list[Problem]:
    """Return numbers of packs that are not divisible by the data ranks: a micro-batch is one packed row."""
    config = run.config
    problems = _packs_divide(run, "data.packs_per_step", config.data.packs_per_step, config.parallel.sp)
    for name, stage in config.stages.items():
        if stage.sp or stage.data.packs_per_step is not None:
            packs, sp = stage.data.packs_per_step or config.data.packs_per_step, stage.sp or config.parallel.sp
            problems += _packs_divide(run, f"stages.{name}.data.packs_per_step", packs, sp)
    return problems


def _packs_divide(run: CheckInput, key: str, packs: int, sp: int) -> list[Problem]:
    if packs < 1 or sp < 1 or run.ranks % sp:
        return []
    ranks = run.ranks // sp
    if packs % ranks == 0:
        return []
    if run.resuming:
        share, full = -(-packs // ranks), ranks - (-packs % ranks)
        allowed = f"{full} of {ranks} data ranks take {share} packs per step, the others {share - 1} and an empty one"
        remedy = "The steps stay the same but take longer; a number of ranks that divides the packs wastes nothing"
        return [problem(key, packs, allowed, remedy, warning=True)]
    below, above = packs // ranks * ranks, -(-packs // ranks) * ranks
    nearest = " or ".join(f"{key}={n}" for n in (below, above) if n)
    allowed = f"it must be divisible by the {ranks} data ranks, because each of them takes complete packed rows"
    return [problem(key, packs, allowed, f"Use {nearest}")]


def _expert_ranks(run: CheckInput) -> list[Problem]:
    """Return problems if the size of an expert-parallel group does not divide the ranks or the experts."""
    ep, base = run.config.parallel.ep, run.base
    if ep < 1:
        return []
    problems = []
    if run.ranks % ep:
        problems.append(problem("parallel.ep", ep, *divides_the_ranks("parallel.ep", ep, run.ranks)))
    if base is None:
        return problems
    if base.text.experts is None:
        if ep > 1:
            allowed = f"{base.name} is dense: it has no experts"
            problems.append(problem("parallel.ep", ep, allowed, "Set parallel.ep=1"))
    elif base.text.experts.num_experts % ep:
        experts = base.text.experts.num_experts
        allowed = f"it must divide the {experts} experts of {base.name}"
        problems.append(problem("parallel.ep", ep, allowed, f"Use one of {divisors(experts)}"))
    return problems


def _long_rows(run: CheckInput) -> list[Problem]:
    """Return the problems of sequence parallelism and of options that save memory for long rows."""
    return [*sequence_problems(run.config, run.base, ranks=run.ranks), *memory_problems(run.config)]


def _context(run: CheckInput) -> list[Problem]:
    config = run.config
    rows = [config.data.tokens_per_pack, *(stage.data.tokens_per_pack or 0 for stage in config.stages.values())]
    return context_problems(config.context, run.base, longest_row=max(rows))


def _balance(run: CheckInput) -> list[Problem]:
    """Return coefficients of the balance and z losses that have no effect, or no router to act on."""
    moe, base = run.config.moe, run.base
    problems = []
    for key, value in {"balance_coefficient": moe.balance_coefficient, "z_coefficient": moe.z_coefficient}.items():
        if not (isfinite(value) and value >= 0):
            problems.append(
                problem(f"moe.{key}", value, "it must be a finite number of 0 or more", f"Set another moe.{key}")
            )
    if moe.balance != "off" and moe.balance_coefficient == 0:
        allowed = f"moe.balance={moe.balance} does nothing without a coefficient"
        remedy = "Set a number above 0 (1e-3 is usual), or moe.balance=off"
        problems.append(problem("moe.balance_coefficient", 0.0, allowed, remedy))
    if moe.balance == "off" and moe.balance_coefficient != MoeConfig.balance_coefficient:
        remedy = "Set moe.balance=global, or leave the coefficient out"
        allowed = "it has no effect, because moe.balance is off"
        problems.append(problem("moe.balance_coefficient", moe.balance_coefficient, allowed, remedy))
    if base is not None and base.text.experts is None:
        problems += [
            problem(key, value, f"{base.name} is dense: it has no router", f"Leave {key} out")
            for key, value in _terms(moe)
        ]
    return problems


def _adapters(run: CheckInput) -> list[Problem]:
    """Return problems of the parts to train, with warnings about losses on a frozen router."""
    problems = [*adapter_problems(run.config.adapters, run.base), *quantise_problems(run.config, run.base)]
    if run.base is not None and run.base.text.experts is not None:
        problems += frozen_router(run.config.moe, router_trains=run.config.adapters.router.mode != "frozen")
    return problems


def frozen_router(moe: MoeConfig, *, router_trains: bool) -> list[Problem]:
    """Return warnings about losses on a router that does not train."""
    allowed = "the router is frozen, so the loss can only move the hidden states that the router sees"
    remedy = "Train the router, or leave the key out: the load is logged either way"
    return [] if router_trains else [problem(key, value, allowed, remedy, warning=True) for key, value in _terms(moe)]


def _terms(moe: MoeConfig) -> list[tuple[str, object]]:
    """Return the keys that add a loss on the router, with their values."""
    terms: list[tuple[str, object]] = [("moe.balance", moe.balance)] if moe.balance != "off" else []
    return terms + ([("moe.z_coefficient", moe.z_coefficient)] if moe.z_coefficient else [])


def _attention(run: CheckInput) -> list[Problem]:
    """Return a problem for sdpa with long rows: its mask grows with the square of the row."""
    name = run.config.model.attention
    tokens = max(tokens for _, tokens in by_stage(run.config, "tokens_per_pack"))
    if name != "sdpa" or tokens <= MASK_TOKENS:
        return []
    allowed = f"it builds a mask of {tokens:,} x {tokens:,} for a packed row; the limit is {MASK_TOKENS:,} tokens"
    return [problem("model.attention", name, allowed, "Set model.attention=auto, which builds none")]


def _evaluation(run: CheckInput) -> list[Problem]:
    return eval_problems(run.config)


def _schedule(run: CheckInput) -> list[Problem]:
    """Return problems of schedule and stages; if there are none, warnings about unpublished values."""
    problems = [*schedule_problems(run.config), *stage_problems(run.config)]
    return problems or list(published_problems(run.config, run.base))


CHECKS: tuple[Callable[[CheckInput], list[Problem]], ...] = (
    _data,
    _ranges,
    _media,
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
