"""`moetune init`: a small recipe of your own, from a few answers or flags; and the command to start it."""

import argparse
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from data.format.printable import printable
from data.prepare.found import UserData, find_data, hold_out
from finetune.architecture.families import Family, family
from finetune.architecture.shapes import parameter_counts
from finetune.files.hubconfig import read_family
from finetune.planner.fit import fit
from finetune.planner.gpus import Cluster, cluster, gpu_names
from finetune.planner.time import Assumed
from finetune.settings.checks import cross_check
from finetune.settings.problems import ConfigError
from finetune.settings.published import SMALLEST
from finetune.settings.recipes import load_recipe
from finetune.settings.starter import GOALS, Facts, config_of, starter, starter_text

EXAMPLE = """\
  moetune init --data train.jsonl --model Qwen/Qwen3-VL-30B-A3B-Instruct --gpus 8
  moetune init --data shards/invoices --model /models/30b --gpus 8 --gpu h200-141gb --goal documents --out invoices.yaml
  moetune init                                            # asks, on a terminal"""

MODEL = "Qwen/Qwen3-VL-30B-A3B-Instruct"
GPU = "h100-80gb"
REQUIRED = ("data", "model", "gpus")
PER_NODE = 8


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument(
        "--data", metavar="PATH", help="shards, a .jsonl or .json file of rows, or a folder with images and such a file"
    )
    parser.add_argument("--model", metavar="PATH", help=f"the base model: a folder, or a hub id such as {MODEL}")
    parser.add_argument("--gpus", metavar="N", help="GPUs of the run")
    parser.add_argument("--gpu", metavar="NAME", help=f"which (default {GPU}): {', '.join(gpu_names())}")
    parser.add_argument("--goal", metavar="NAME", help=f"what for (default general): {', '.join(GOALS)}")
    parser.add_argument("--out", metavar="FILE", default="my-recipe.yaml", help="default my-recipe.yaml")


def run(args: argparse.Namespace) -> int:
    """Write the recipe, and say what it does and what comes next."""
    out = Path(args.out)
    if out.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--out is {args.out!r}; the name of a recipe ends in .yaml")
    if out.exists():
        raise ValueError(f"--out: {out} is there already; name another file")
    answers = _answers(args)
    gpus, goal = _count(answers["gpus"]), answers["goal"]
    if goal not in GOALS:
        raise ValueError(f"--goal is {goal!r}; it must be one of {', '.join(GOALS)}")
    base, name = _base(answers["model"])
    data = _find(answers["data"])
    facts = Facts(goal=goal, model=answers["model"], family=name, gpus=gpus, data=data)
    machines = cluster(answers["gpu"], gpus=gpus, per_node=None, price=None)
    layout, why = _layout(starter(facts, base), base, machines)
    facts = replace(facts, data=hold_out(data))  # it writes files, so nothing before it may fail
    tree = starter(facts, base)
    tree["parallel"] |= layout
    command = _next(out, gpus)
    _write(out, starter_text(tree, _head(command)), gpus)
    print(f"wrote {out}: {goal}, {gpus} x {answers['gpu']}; {why}")
    print(f"evaluation: {facts.data.how}")
    print(f"next: {command}")
    return 0


def _answers(args: argparse.Namespace) -> dict[str, str]:
    """Return the five answers: flags, what is asked on a terminal, and defaults."""
    questions = {
        "data": ("Data: shards, rows (.jsonl), or a folder with both images and rows", _usual_data()),
        "model": ("Base model: a folder or a hub id", MODEL),
        "gpus": ("How many GPUs", "8"),
        "gpu": (f"Which ({', '.join(gpu_names())})", GPU),
        "goal": (f"What for ({', '.join(GOALS)})", "general"),
    }
    missing = [f"--{name}" for name in REQUIRED if getattr(args, name) is None]
    if missing and not sys.stdin.isatty():
        raise ValueError(
            f"{', '.join(missing)} must be given where there is no terminal to ask on, as in: moetune init --data "
            f"train.jsonl --model {MODEL} --gpus 8"
        )
    answers = {}
    for name, (question, default) in questions.items():
        given = getattr(args, name)
        answers[name] = given or (_ask(name, question, default) if missing else default)
    return answers


def _ask(name: str, question: str, default: str) -> str:
    try:
        answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
    except EOFError:
        answer = ""
    if not answer:
        raise ValueError(f"--{name} is missing: nothing was answered")
    return answer


def _usual_data() -> str:
    return "train.jsonl" if Path("train.jsonl").is_file() else ""


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--gpus must be a whole number from 1, found {text!r}")
    return int(text)


def _base(model: str) -> tuple[Family, str]:
    """Return the base's shape, and the name of its family where no folder says what it is."""
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return read_family(folder), ""
    if folder.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ValueError(
            f"--model: there is no {folder / 'config.json'}. Give the folder of a base, or a hub id ({MODEL})"
        )
    try:
        base = family(model)
    except ValueError as error:
        raise ValueError(f"--model: the folder {model} does not exist, and as a hub id: {error}") from error
    return base, base.name


def _find(path: str) -> UserData:
    try:
        return find_data(Path(path))
    except ValueError as error:
        raise ValueError(f"--data: {error}") from error


def _layout(tree: dict[str, Any], base: Family, machines: Cluster) -> tuple[dict[str, Any], str]:
    """Return the keys of `parallel:` that the planner proposes for a recipe, and a sentence on them."""
    if parameter_counts(base).total < SMALLEST:
        return {"ep": 1}, "nothing was planned for so small a base"
    config = config_of(tree)
    proposed = fit(config, base, machines, assumed=Assumed(), free=("ep", "sp", "resident", "recompute"))
    if proposed.best is None:
        raise ValueError(f"--gpus, --gpu: this does not fit {machines.gpus} x {machines.gpu.name}. {proposed.advice}")
    layout = proposed.best.plan.layout
    keys: dict[str, Any] = {"ep": layout.ep} | ({"sp": layout.sp} if layout.sp > 1 else {})
    keys |= {"recompute": layout.recompute} | ({} if layout.resident else {"resident": "none"})
    return keys, f"the planner foresees {proposed.best.reason.partition(':')[0]}"


def _next(out: Path, gpus: int) -> str:
    if gpus > PER_NODE:
        return f"moetune launch {out} --on PROFILE.yaml    (docs/recipes.md shows profiles of clusters)"
    return f"moetune train {out} --ranks {gpus}"


def _write(out: Path, text: str, gpus: int) -> None:
    """Write the recipe and check it as `moetune check` does; warnings are printed, errors take it back."""
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ValueError(f"--out: {out} is there already; name another file") from error
    config, problems = load_recipe(str(out))
    problems += cross_check(config, ranks=gpus, known=[wrong.key for wrong in problems])
    if any(wrong.level == "error" for wrong in problems):
        out.unlink()
        raise ConfigError(problems)
    for wrong in problems:
        print(printable(f"warning: {wrong}"), file=sys.stderr)


def _head(command: str) -> str:
    schema = Path(str(files("configs") / "recipe.schema.json"))
    line = f"# yaml-language-server: $schema={schema}\n" if schema.is_file() else ""
    return f"{line}# Written by `moetune init`. Start it:   {command}\n# Other keys:   moetune explain KEY\n"
