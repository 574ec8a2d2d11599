"""The data of a run: every source can be read, its first samples can be used, and an epoch fills a step. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data.format.printable import count_of
from data.peek import LOOKED_AT, packs_of_an_epoch, peek
from data.render.fingerprint import files_fingerprint
from data.shards.bytes import places_of
from data.stream.plan import plan_settings
from finetune.config import RunConfig
from finetune.preflight.places import SOURCES
from finetune.settings.problems import Problem, problem
from finetune.settings.stages import Stage, run_stages

_ROWS = "Fix the rows; `moetune shards build` lists every row that it refuses, with the reason"
_LONG = "Raise data.tokens_per_pack (or data.vision_tokens_per_pack), or set data.overlong to skip or split-turns"
_FEW = "Lower data.packs_per_step or data.tokens_per_pack, add data, or set data.remainder=keep"
UNKNOWN = "data: the number of packs is not known yet; the start counts the tokens of every sample once"


def source_problems(config: RunConfig, *, missing: Sequence[str]) -> Iterator[Problem]:
    """Yield sources that cannot be read, and unusable first samples; `missing` are the keys of those not there."""
    enough = max(1, *(stage.data.packs_per_step for stage in run_stages(config)))
    counts = dict[str, int]()
    sources = {f"data.sources.{name}.path": source for name, source in config.data.sources.items()}
    sources |= {f"eval.sources.{name}.path": source.as_data for name, source in config.eval.sources.items()}
    for key, source in sources.items():
        path = source.path
        if key in missing:
            continue
        try:
            looked = peek(source, key, config.data, enough=enough)
        except (ValueError, OSError) as error:
            text = str(error).removeprefix(f"{key} ").removeprefix(f"is {path!r}, which ").rstrip(".")
            yield problem(key, path, text, SOURCES)
            continue
        counts[key] = looked.at_least
        if looked.refused:
            every = len(looked.refused) == looked.looked_at
            share = "no sample" if every else f"not all of the first {LOOKED_AT} samples"
            yield problem(key, path, f"{share} can be used: {looked.refused[0]}", _ROWS, warning=not every)
    if not missing:
        yield from _too_few_samples(config, counts)


def _too_few_samples(config: RunConfig, counts: Mapping[str, int]) -> Iterator[Problem]:
    """Yield a finding where there are fewer samples than packs in a step; one that is cut by turns makes several."""
    data = config.data
    keys = [f"data.sources.{name}.path" for name in data.sources]
    is_exact = data.mixture == "natural" and data.remainder == "drop" and data.overlong != "split-turns"
    if not is_exact or any(key not in counts for key in keys):
        return
    samples = sum(counts[key] for key in keys)
    if samples < data.packs_per_step:
        allowed = f"all sources together have {count_of(samples, 'sample')}, so an epoch has no step of that many packs"
        yield problem("data.packs_per_step", data.packs_per_step, allowed, _FEW)


def packs(config: RunConfig, base_folder: Path) -> tuple[str, list[Problem]]:
    """Return a line about the packs of an epoch, and the stages that have none."""
    problems, line = [], ""
    for stage in run_stages(config):
        text, wrong = _packs_of(config, stage, base_folder)
        line = line or text
        problems += wrong
    return line, problems


def _packs_of(config: RunConfig, stage: Stage, base_folder: Path) -> tuple[str, list[Problem]]:
    data, key = stage.data, f"stages.{stage.name}.data" if stage.name else "data"
    fingerprint = files_fingerprint(base_folder, image=data.image, video=data.video, chat=data.chat)
    settings = plan_settings(data, seed=config.run.seed)
    try:
        count = packs_of_an_epoch(data, settings, places_of(data), files_fingerprint=fingerprint)
    except ValueError as error:
        return "", [problem(f"{key}.tokens_per_pack", data.tokens_per_pack, str(error), _LONG)]
    if count is None:
        return UNKNOWN, []
    steps = count // data.packs_per_step if data.remainder == "drop" else -(-count // data.packs_per_step)
    if not steps:
        allowed = f"an epoch fills only {count_of(count, 'pack')} of {data.tokens_per_pack:,} tokens, which is no step"
        return "", [problem(f"{key}.packs_per_step", data.packs_per_step, allowed, _FEW)]
    return f"data: {count_of(count, 'pack')} and {count_of(steps, 'step')} per epoch", []
