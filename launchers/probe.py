"""`moetune probe`: test what a model is said to do: each probe shows made-up media, and takes one mechanism away."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.arguments import load_speaker, model_arguments, positive

if TYPE_CHECKING:
    from finetune.ask.speaker import Speaker
    from finetune.probes.picture import Grid
    from finetune.probes.score import Score

Found = tuple[dict[str, Any], Mapping[str, "Sequence[Grid]"]]
"""The content of a probe's JSON file, and the grids of its pictures by the names of their files."""

EXAMPLE = """\
  moetune probe needle base --adapter runs/long/adapter --lengths 8192,32768,131072 --out needles
  moetune probe needle base --kind video --lengths 4096 --depths 0,0.5,1 --trials 5
  moetune probe needle merged --lengths 524288 --set context.yarn.factor=3
  moetune probe timestamps base --adapter runs/clips/adapter         # with the times in the text, and without
  moetune probe deepstack base --heights 12,16,24 --side 768 --trials 50
  moetune probe balance merged --json"""

PROBES = {
    "needle": "is one fact, or one frame, found in a long context?",
    "timestamps": "when is a colour shown, and which at a time? with and without the times in the text",
    "deepstack": "are small letters read? with DeepStack's features, without, and with each level alone",
    "order": "which colour comes first, which last? with the frames in order, and shuffled",
    "resolution": "which letters are read with all pixels, a half, a quarter, an eighth?",
    "balance": "how are tokens of each kind spread over the experts, and which experts get none?",
}
"""The probes, and what each asks."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of every probe."""
    probes = parser.add_subparsers(dest="what", required=True, metavar="PROBE")
    for name, about in PROBES.items():
        sub = probes.add_parser(name, help=about, description=about, allow_abbrev=False)
        sub.add_argument("model", metavar="MODEL", help="a base or merged model: a folder or a hub id")
        if name == "needle":
            _needle_arguments(sub)
        else:
            _media_arguments(sub, name)
        out = "needles" if name == "needle" else "probes"
        sub.add_argument("--seed", type=int, default=0, help="seed of what is shown (default 0)")
        sub.add_argument(
            "--out",
            type=Path,
            default=Path(out),
            metavar="DIR",
            help=f"folder for {name}.json and its picture; an earlier {name}.json is not overwritten (default: {out})",
        )
        model_arguments(sub)
        sub.add_argument("--json", action="store_true", help=f"print the content of {name}.json on standard output")
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _media_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    trials, what = (8, "texts, pictures and clips, of each") if name == "balance" else (20, "questions for one score")
    parser.add_argument("--trials", type=positive, default=trials, help=f"number of {what} (default {trials})")
    side = 768 if name in ("deepstack", "resolution") else 64
    parser.add_argument(
        "--side", type=positive, default=side, help=f"sides of pictures and frames in pixels (default {side})"
    )
    if name in ("deepstack", "resolution"):
        parser.add_argument(
            "--heights",
            type=_lengths,
            default=(8, 12, 16, 24, 32),
            help="heights of the letters in pixels, separated by commas (default 8,12,16,24,32)",
        )


def _needle_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind",
        choices=("text", "video", "both"),
        default="both",
        help="haystacks of text, of video, or of both (default both)",
    )
    parser.add_argument(
        "--lengths",
        type=_lengths,
        default=(1024, 2048, 4096),
        help="lengths in tokens, separated by commas (default 1024,2048,4096)",
    )
    parser.add_argument(
        "--depths",
        type=_depths,
        default=(0.0, 0.25, 0.5, 0.75, 1.0),
        help="depths of the needle, from 0 (beginning) to 1 (end) (default 0,0.25,0.5,0.75,1)",
    )
    parser.add_argument("--trials", type=positive, default=3, help="haystacks for each length and depth (default 3)")


def run(args: argparse.Namespace) -> int:
    """Probe, print a table, and write the JSON and the pictures."""
    from finetune.probes.picture import draw_grids

    path: Path = args.out / f"{args.what}.json"
    if path.exists():
        raise ValueError(
            f"--out: {path} exists from an earlier probe, and is not overwritten. Name another folder with --out"
        )
    probes: dict[str, Callable[[argparse.Namespace], Found]] = {"needle": _needle, "balance": _balance}
    found, pictures = probes.get(args.what, _scores)(args)
    head = {"model": args.model, "adapter": str(args.adapter or ""), "seed": args.seed, "trials": args.trials}
    content = head | found
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    for name, grids in pictures.items():
        draw_grids(grids, args.out / name)
    print(json.dumps(content, indent=1) if args.json else f"wrote {path}, {', '.join(pictures)}")
    return 0


def _models(args: argparse.Namespace) -> "Iterator[tuple[str, Speaker, AbstractContextManager[None]]]":
    """Yield the model, or base and adapted; each with a context in which the speaker answers as that model."""
    speaker = load_speaker(args.model, args, adapter=args.adapter)
    if args.adapter is None:
        yield "model", speaker, nullcontext()
        return
    if speaker.switches:
        yield "base", speaker, speaker.base_alone()
    else:
        yield "base", load_speaker(args.model, args, adapter=None), nullcontext()
    yield "adapted", speaker, nullcontext()


def _scores(args: argparse.Namespace) -> Found:
    """Run a probe that yields scores: a table for each model."""
    from importlib import import_module

    from finetune.probes.picture import Grid
    from finetune.probes.score import grid, table

    options: dict[str, Any] = {"trials": args.trials, "seed": args.seed, "side": args.side}
    options |= {"heights": args.heights} if "heights" in args else {}
    probe: Callable[..., Iterator[Score]] = import_module(f"finetune.probes.{args.what}").probe
    models: dict[str, list[Score]] = {}
    for name, speaker, alone in _models(args):
        with alone:
            models[name] = list(probe(speaker, **options))
        _say(args, f"{name}:", *table(models[name]))
    grids = []
    for name, scores in models.items():
        rows, columns, values = grid(scores)
        grids.append(Grid(title=f"{args.what}: {name}", rows=rows, columns=columns, values=values))
    found = {"models": {name: [asdict(score) for score in scores] for name, scores in models.items()}}
    return found | {key: options[key] for key in ("side", "heights") if key in options}, {f"{args.what}.png": grids}


def _balance(args: argparse.Namespace) -> Found:
    """Count the load of the experts: a line for each kind of token, and a picture of layers and experts."""
    from finetune.probes.balance import load_lines, probe
    from finetune.probes.picture import Grid

    models, grids = {}, []
    for name, speaker, alone in _models(args):
        with alone:
            loads = probe(speaker, trials=args.trials, seed=args.seed, side=args.side)
        _say(args, f"{name}:", *load_lines(loads))
        models[name] = [load.to_json() for load in loads]
        for load in loads:
            layers, experts = (list(map(str, range(count))) for count in (len(load.shares), len(load.shares[0])))
            title = f"{name}: {load.kind}, load by layer and expert (1 is even)"
            grids.append(Grid(title=title, rows=layers, columns=experts, values=load.shares, top=2.0))
    return {"side": args.side, "models": models}, {"balance.png": grids}


def _needle(args: argparse.Namespace) -> Found:
    """Look for needles: a line for each length and depth, and a picture for each kind."""
    from finetune.probes.needle import probe
    from finetune.probes.picture import Grid

    kinds = ("text", "video") if args.kind == "both" else (args.kind,)
    report: dict[str, dict[str, list[dict[str, float]]]] = {kind: {} for kind in kinds}
    options = {"lengths": args.lengths, "depths": args.depths, "trials": args.trials, "seed": args.seed}
    for model, speaker, alone in _models(args):
        with alone:
            for kind in kinds:
                rows = report[kind].setdefault(model, [])
                for cell in probe(speaker, kind, **options):
                    rows.append(asdict(cell))
                    place = f"{cell.length:,} tokens, depth {cell.depth:.0%}"
                    _say(args, f"{model}, {kind}, {place}: found {cell.found:.2f}")
    pictures = {}
    for kind, models in report.items():
        grids = []
        for model, cells in models.items():
            shares = {(cell["length"], cell["depth"]): cell["found"] for cell in cells}
            values = [[shares[length, depth] for length in args.lengths] for depth in args.depths]
            depths, lengths = [f"depth {depth:.0%}" for depth in args.depths], [f"{n:,}" for n in args.lengths]
            grids.append(Grid(title=f"{kind} needles: {model}", rows=depths, columns=lengths, values=values))
        pictures[f"needle-{kind}.png"] = grids
    return {"kinds": report}, pictures


def _say(args: argparse.Namespace, *lines: str) -> None:
    if not args.json:
        print("\n".join(lines), flush=True)


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(positive(word) for word in text.split(","))


def _depths(text: str) -> tuple[float, ...]:
    try:
        depths = tuple(float(word) for word in text.split(","))
    except ValueError:
        depths = (-1.0,)
    if not all(0 <= depth <= 1 for depth in depths):
        raise argparse.ArgumentTypeError(f"it must be numbers from 0 to 1, separated by commas, found {text!r}")
    return depths
