"""`moetune plan`: what a run will take in memory, traffic, time and money, before anything is started."""

import argparse
import json
from dataclasses import replace
from typing import Any

from finetune.config import RunConfig
from finetune.planner.fit import AUTO_EP, FREE, Fit, fit, sp_sizes
from finetune.planner.gpus import Cluster, cluster, gpu_names
from finetune.planner.plan import plan
from finetune.planner.text import fit_lines, plan_lines
from finetune.planner.time import Assumed
from finetune.settings.checks import base_family, require
from finetune.settings.recipes import load_recipe
from launchers.arguments import positive

EXAMPLE = """\
  moetune plan qwen3-vl-30b-a3b-lora --gpus 8 --gpu h100-80gb --price 2.5
  moetune plan qwen3-vl-30b-a3b-lora --gpus 16 --gpu a100-80gb --fit
  moetune plan qwen3-vl-235b-a22b-lora --gpus 64 --gpu h100-80gb --json"""

EXIT_CODES = {3: "the run does not fit the GPUs"}

_SHARES = {
    "vision_share": "share of tokens that images have, from 0 to 1 (default %(default)g)",
    "supervised_share": "share of tokens that carry loss, from 0 to 1 (default %(default)g)",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    assumed = Assumed()
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that win over the file's")
    parser.add_argument("--gpus", type=positive, metavar="N", required=True, help="GPUs of the run")
    parser.add_argument("--gpu", metavar="NAME", required=True, help=f"their kind: {', '.join(gpu_names())}")
    parser.add_argument("--per-node", type=positive, metavar="N", help="GPUs of a node (default 8)")
    parser.add_argument("--price", type=float, metavar="P", help="price of a GPU for an hour, in any currency")
    parser.add_argument(
        "--fit",
        action="store_true",
        help="propose parallel.*, data.tokens_per_pack and, if nothing fits, model.quantise.*",
    )
    for flag, text in (("sample_tokens", "tokens of a sample"), ("image_tokens", "tokens of an image")):
        words = {"metavar": "N", "default": getattr(assumed, flag), "help": f"{text} (default %(default)d)"}
        parser.add_argument(f"--{flag.replace('_', '-')}", type=positive, **words)
    for flag, text in _SHARES.items():
        default = getattr(assumed, flag)
        parser.add_argument(f"--{flag.replace('_', '-')}", type=_share, metavar="S", default=default, help=text)
    text = "rows of the busiest of eight ranks' experts over the mean (default %(default)g)"
    parser.add_argument("--skew", type=_skew, metavar="X", default=assumed.skew, help=text)
    text = "microseconds that the host needs to hand out an operation (default %(default)g)"
    parser.add_argument("--launch-us", type=_above_zero, metavar="U", default=assumed.launch_us, help=text)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Print the plan; 3 when it does not fit."""
    machines = cluster(args.gpu, gpus=args.gpus, per_node=args.per_node, price=args.price)
    assumed = Assumed(
        sample_tokens=args.sample_tokens,
        image_tokens=args.image_tokens,
        launch_us=args.launch_us,
        skew=args.skew,
        **{name: getattr(args, name) for name in _SHARES},
    )
    config, problems = load_recipe(args.config, args.overrides)
    free = _free(config, args.fit)
    checked = config
    if args.fit and not problems:  # what is to be proposed need not suit the ranks yet
        sp = sp_sizes(base_family(config), machines, config)[0]
        checked = replace(config, parallel=replace(config.parallel, ep=AUTO_EP, sp=sp))
    require(checked, problems, ranks=machines.gpus)
    if config.schedule.epochs:
        from finetune.preflight.epochs import counted

        config = counted(config)
    base = base_family(config)
    if not free:
        planned = plan(config, base, machines, assumed=assumed)
        print(json.dumps(planned.as_dict()) if args.json else "\n".join(plan_lines(planned)))
        if not planned.fits and not args.json:
            print("\n" + _advice(config, machines, assumed))
        return 0 if planned.fits else 3
    proposed = fit(config, base, machines, assumed=assumed, free=free)
    if proposed.best is None:
        print(json.dumps(_fit_dict(proposed)) if args.json else "\n".join(fit_lines(proposed)))
        return 3
    planned = proposed.best.plan
    if args.json:
        print(json.dumps(planned.as_dict() | _fit_dict(proposed)))
    else:
        print("\n".join([*fit_lines(proposed), "", *plan_lines(planned)]))
    return 0


def _free(config: RunConfig, everything: bool) -> list[str]:
    """Return what the search may change."""
    if everything:
        return list(FREE)
    autos = {"ep": config.parallel.ep == AUTO_EP, "recompute": config.parallel.recompute == "auto"}
    return [key for key, auto in autos.items() if auto]


def _advice(config: RunConfig, machines: Cluster, assumed: Assumed) -> str:
    proposed = fit(config, base_family(config), machines, assumed=assumed)
    if proposed.best is None:
        return f"It does not fit. {proposed.advice}"
    changes = " ".join(f"{key}={value}" for key, value in proposed.best.changes.items())
    return f"It does not fit as it is; this does: {changes}"


def _fit_dict(proposed: Fit) -> dict[str, Any]:
    proposals = [proposed.best, *proposed.others] if proposed.best else []
    listed = [
        {"changes": proposal.changes, "reason": proposal.reason, "margin": proposal.plan.margin}
        for proposal in proposals
    ]
    return {"fit": {"proposals": listed, "advice": proposed.advice}}


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"it must be a share from 0 to 1, found {text!r}")
    return value


def _above_zero(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"it must be more than 0, found {text!r}")
    return value


def _skew(text: str) -> float:
    value = float(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"it must be 1 or more, found {text!r}")
    return value
