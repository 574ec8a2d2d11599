"""`moetune check`: what a recipe means, before anything is started."""

import argparse
import json
import sys
from dataclasses import asdict, replace

from omegaconf import OmegaConf

from data.format.printable import printable
from finetune.config import RunConfig
from finetune.preflight.places import missing_paths
from finetune.ranks.versions import command, demand, installed_versions, untested
from finetune.settings.checks import cross_check
from finetune.settings.derive import derive
from finetune.settings.problems import Problem
from finetune.settings.recipes import effective, load_recipe, recipe_names
from finetune.settings.typed import leaves
from launchers.arguments import positive

EXAMPLE = """\
  moetune check tiny-cpu
  moetune check configs/tiny-cpu.yaml data.packs_per_step=16 --ranks 4
  moetune check qwen3-vl-30b-a3b-lora --diff tiny-cpu"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that win over the file's")
    parser.add_argument("--ranks", type=positive, metavar="N", help="GPUs of the run (default: as few as it allows)")
    parser.add_argument("--diff", metavar="CONFIG", help="print only what differs from this recipe")
    parser.add_argument("--reads", action="store_true", help="also: what each rank reads and keeps when loading")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Print the effective config, the derived numbers, the problems; 2 when there are errors."""
    config, problems = load_recipe(args.config, args.overrides)
    if config.schedule.epochs and not problems and not cross_check(config, ranks=args.ranks):
        from finetune.preflight.epochs import counted

        config = counted(config)
    problems += cross_check(config, ranks=args.ranks, known=[problem.key for problem in problems])
    problems += [*_missing(args, config), *_versions()]
    errors = [problem for problem in problems if problem.level == "error"]
    tree = effective(config)
    if args.diff:
        other, other_problems = load_recipe(args.diff)
        problems += other_problems
        name = f"{args.config} with overrides" if args.overrides else args.config
        tree = _difference(leaves(tree), leaves(effective(other)), name, args.diff)
    derived = [] if errors else derive(config, ranks=args.ranks, reads=args.reads)
    if args.json:
        numbers = {line.name: {"value": line.value, "derivation": line.text} for line in derived}
        key = "difference" if args.diff else "config"
        print(json.dumps({key: tree, "derived": numbers, "problems": [asdict(problem) for problem in problems]}))
    else:
        print(OmegaConf.to_yaml(OmegaConf.create(tree)) if tree else "no difference")
        for line in () if args.diff else derived:
            print(line.text)
        _print_problems(problems)
    return 2 if errors else 0


def _difference(config: dict[str, object], other: dict[str, object], name: str, other_name: str) -> dict[str, object]:
    values = {key: (config.get(key, "absent"), other.get(key, "absent")) for key in config | other}
    return {key: {name: value, other_name: at_other} for key, (value, at_other) in values.items() if value != at_other}


def _missing(args: argparse.Namespace, config: RunConfig) -> list[Problem]:
    """Return warnings: a recipe may be read where its data are not. The paths of a shipped one are examples."""
    is_shipped = args.config in recipe_names()
    return [
        replace(wrong, level="warning")
        for wrong in missing_paths(config)
        if not is_shipped or any(word.startswith(f"{wrong.key}=") for word in args.overrides)
    ]


def _versions() -> list[Problem]:
    """Return warnings only, and none of what is missing: a recipe may be read on a laptop that will not run it."""
    return [
        Problem(
            key=name,
            found=version,
            source="installed here",
            allowed=demand(name),
            remedy=f"Run {command(name)}",
            level="warning",
        )
        for name, version in untested(installed_versions())
    ]


def _print_problems(problems: list[Problem]) -> None:
    for level in ("warning", "error"):
        for problem in problems:
            if problem.level == level:
                print(printable(f"{level}: {problem}"), file=sys.stderr)
