"""Two reports of `moetune shards`: what an epoch contains, and what an evaluation shares with the training data."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.format.printable import count_of, one_line, printable
from launchers.arguments import positive

if TYPE_CHECKING:
    from data.config import DataConfig
    from data.prepare.overlap import Overlap
    from data.shards.bytes import Places

_HEAD: tuple[str, ...] = (
    "source",
    "samples",
    "of",
    "reads each",
    "tokens",
    "share",
    "vision",
    "images",
    "videos",
    "video time",
)
SHOWN = 20
"""Matches that `overlap` prints; --json has all of them."""


def declare_overlap(action: Callable[..., argparse.ArgumentParser]) -> None:
    """Declare the arguments of `overlap`."""
    parser = action(
        "overlap",
        "find samples of an evaluation that the training data contains too; exit code 3 above --limit",
        "shards of the training data: a tar, a folder or a pattern",
    )
    parser.add_argument("eval", metavar="EVAL", help="shards of the evaluation")
    parser.add_argument(
        "--limit",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="share of EVAL's samples that may match, from 0 to 1 (default 0)",
    )
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="processes (default 1)")


def declare_mix(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the arguments of `mix`, which reads a recipe and not shards."""
    text = "print what an epoch of a recipe reads of each source: samples, tokens, images, seconds, repeats"
    parser = actions.add_parser("mix", help=text, description=text, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that win over the recipe's")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def overlap(args: argparse.Namespace, places: "Places") -> int:
    """Print what both sets of shards contain; 3 if it is more than --limit allows."""
    from data.prepare.overlap import find_overlap
    from data.prepare.progress import Progress
    from data.shards.find import find_shards

    train, evaluation = (
        find_shards(path, key, cache_dir=args.cache_dir) for path, key in ((args.path, "PATH"), (args.eval, "EVAL"))
    )
    if shared := sorted({path.resolve() for path in train} & {path.resolve() for path in evaluation}):
        raise ValueError(f"PATH and EVAL both name {shared[0]}; give the shards of EVAL a folder of their own")
    with Progress("compared", len(train), unit="shards") as progress:
        report = find_overlap(
            train,
            evaluation,
            jobs=args.jobs,
            cache_dir=args.cache_dir,
            places=places,
            progress=progress,
        )
    print(json.dumps(asdict(report)) if args.json else printable("\n".join(_overlap_lines(report))))
    return 3 if report.matched > args.limit * report.samples else 0


def _overlap_lines(report: "Overlap") -> list[str]:
    lines = [
        f"{match.kind} {match.share:4.0%}  {one_line(match.sample)}  is in  {one_line(match.found_in)}"
        for match in report.matches[:SHOWN]
    ]
    if len(report.matches) > SHOWN:
        lines.append(f"and {len(report.matches) - SHOWN:,} more; --json lists all")
    share = report.matched / report.samples if report.samples else 0.0
    lines.append(
        f"{report.matched:,} of {count_of(report.samples, 'sample')} of the evaluation ({share:.1%}) match; "
        f"{count_of(report.trained, 'sample')} of the training data read"
    )
    if report.too_little:
        lines.append(f"not compared, with too few words and no picture: {count_of(report.too_little, 'sample')}")
    if report.unreadable:
        count = count_of(len(report.unreadable), "sample")
        lines.append(f"not compared, because they cannot be read: {count}, the first: {one_line(report.unreadable[0])}")
    return lines


def mix(args: argparse.Namespace) -> int:
    """Print the sources of an epoch, for each stage of the recipe."""
    from dataclasses import replace

    from finetune.files.hub import model_folder
    from finetune.settings.checks import require
    from finetune.settings.recipes import load_recipe
    from finetune.settings.stages import run_stages

    config, problems = load_recipe(args.config, args.overrides)
    require(config, problems, ranks=None)
    base = model_folder(config.model.path)
    answers: list[dict[str, Any]] = []
    seen: list[DataConfig] = []
    # the steps of a run of epochs are not known yet, and no stage of it needs them
    steps = config.schedule.steps or 1
    for stage in run_stages(replace(config, schedule=replace(config.schedule, steps=steps))):
        if stage.data not in seen:
            seen.append(stage.data)
            answers.append(_stage_mix(stage.name, stage.data, base, seed=config.run.seed, jobs=args.jobs))
    print(json.dumps({"stages": answers}) if args.json else printable("\n".join(_mix_lines(answers))))
    return 0


def _stage_mix(name: str, data: "DataConfig", base: Path, *, seed: int, jobs: int) -> dict[str, Any]:
    from data.open import open_corpus
    from data.render.sample import Renderer
    from data.stream.mix import epoch_shares
    from data.stream.plan import PATCHES_PER_TOKEN, make_plan, plan_settings

    renderer = Renderer(base, image=data.image, video=data.video, chat=data.chat)
    corpus = open_corpus(data, renderer, jobs=jobs)
    plan = make_plan(corpus.sources, plan_settings(data, seed=seed), epoch=0)
    cache = Path(data.cache_dir) if data.cache_dir else None
    shares = epoch_shares(corpus, plan, patches_per_token=PATCHES_PER_TOKEN, cache_dir=cache)
    return {
        "stage": name,
        "steps": plan.steps,
        "packs": len(plan.packs),
        "fill": plan.fill,
        "dropped": plan.dropped,
        "sources": [asdict(share) for share in shares],
    }


def _mix_lines(stages: list[dict[str, Any]]) -> list[str]:
    lines = []
    for stage in stages:
        total = sum(source["tokens"] for source in stage["sources"])
        name = f"stage {stage['stage']}: " if stage["stage"] else ""
        lines.append(
            f"{name}an epoch has {count_of(stage['steps'], 'step')}, {count_of(stage['packs'], 'row')} "
            f"({stage['fill']:.1%} full) and {count_of(total, 'token')}; "
            f"{count_of(stage['dropped'], 'sample')} left out of an incomplete step"
        )
        rows = [_HEAD, *(_source_cells(source, total) for source in stage["sources"])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for first, *rest in rows:
            cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def _source_cells(source: dict[str, Any], total: int) -> tuple[str, ...]:
    minutes, seconds = divmod(round(source["seconds"]), 60)
    hours, minutes = divmod(minutes, 60)
    times = source["samples"] / source["available"]
    return (
        source["name"],
        f"{source['samples']:,}",
        f"{source['available']:,}",
        f"{times:.2f}x" + (f" (up to {source['most_repeats']})" if source["most_repeats"] > 1 else ""),
        f"{source['tokens']:,}",
        f"{source['tokens'] / total:.1%}",
        f"{source['vision_tokens']:,}",
        f"{source['images']:,}",
        f"{source['videos']:,}",
        f"{hours}:{minutes:02}:{seconds:02}",
    )


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"it must be a number from 0 to 1, got {text!r}")
    return share
