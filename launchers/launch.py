"""`moetune launch`: the same run on one laptop, under Slurm, in Kubernetes: rendered from one profile a cluster."""

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from finetune.settings.checks import require
from finetune.settings.recipes import load_recipe, recipe_files
from launchers.launch_places import place_lines
from launchers.manifest import render_kubernetes
from launchers.profile import Profile, read_profile
from launchers.render import Job, Rendered, as_json, render_deepspeed, render_slurm, render_torchrun, shell_line

EXAMPLE = """\
  moetune launch qwen3-vl-235b-a22b-lora --on cluster.yaml model.path=/models/235b
  moetune launch qwen3-vl-235b-a22b-lora --on cluster.yaml model.path=/models/235b --run"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that win over the file's")
    parser.add_argument("--on", type=Path, required=True, metavar="PROFILE", help="the YAML file of a cluster")
    parser.add_argument("--run", action="store_true", dest="start", help="start it, not only show it")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for the files (default: launch/ in the run's folder)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, and no files")


def run(args: argparse.Namespace) -> int:
    """Render, show, and with --run start; the exit code is that of what was started."""
    profile = read_profile(args.on)
    config, problems = load_recipe(args.config, args.overrides)
    require(config, problems, ranks=profile.ranks)
    for line in place_lines(config, profile, starts=args.start):
        print(line, file=sys.stderr)
    folder = (args.out or config.run.path / "launch").absolute()
    top, files = recipe_files(args.config)
    recipe = next(iter(files), args.config)
    job = Job(recipe=recipe, files=files, overrides=args.overrides, run=config.run.name)
    rendered = render(job, profile, folder=folder, top=top)
    if args.json:
        print(as_json(rendered))
        return 0
    for name, text in rendered.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        print(f"wrote {folder / name}", file=sys.stderr)
    print(shell_line(rendered), flush=True)
    if rendered.note:
        print(rendered.note, file=sys.stderr)
    return _start(rendered, profile.workdir) if args.start else 0


def render(job: Job, profile: Profile, *, folder: Path, top: Path = Path()) -> Rendered:
    """Render for the profile's kind; `folder` is where the files will lie, `top` where those of the recipe do."""
    if profile.kind == "torchrun":
        return render_torchrun(job, profile, place=str(top))
    if profile.kind == "deepspeed":
        return render_deepspeed(job, profile, place=str(top), folder=str(folder))
    if profile.kind == "slurm":
        here = replace(profile, workdir=profile.workdir or str(Path.cwd()))  # wherever sbatch is called
        return render_slurm(job, here, folder=str(folder))
    return render_kubernetes(job, profile, folder=str(folder))


def _start(rendered: Rendered, workdir: str) -> int:
    here = workdir if rendered.environment and workdir else None  # a scheduler's job goes there by itself
    try:
        return subprocess.run(rendered.command, env=os.environ | dict(rendered.environment), cwd=here).returncode
    except FileNotFoundError as error:
        raise ValueError(
            f"--run: {rendered.command[0]} is not on this machine ({error.strerror}). Start it where it is, with the "
            f"command above"
        ) from error
