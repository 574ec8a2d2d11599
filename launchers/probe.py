"""`moetune probe`: test whether a base and an adapted model find one fact, or one frame, in a long context."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.arguments import load_speaker, model_arguments, positive

if TYPE_CHECKING:
    from finetune.ask.needle import Cell

EXAMPLE = """\
  moetune probe needle base --adapter runs/long/adapter --lengths 8192,32768,131072 --out needles
  moetune probe needle base --kind video --lengths 4096 --depths 0,0.5,1 --trials 5
  moetune probe needle merged --lengths 524288 --set context.yarn.factor=3"""


OUT_HELP = "folder for needle.json and heatmaps; an earlier needle.json is not overwritten (default: needles)"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument(
        "what", choices=("needle",), metavar="needle", help="the probe: one fact, or one frame, in a long context"
    )
    parser.add_argument("model", metavar="MODEL", help="a base or merged model: a folder or a hub id")
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
    parser.add_argument("--seed", type=int, default=0, help="seed of the haystacks (default 0)")
    parser.add_argument("--out", type=Path, default=Path("needles"), metavar="DIR", help=OUT_HELP)
    model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the content of needle.json on standard output")


def run(args: argparse.Namespace) -> int:
    """Probe, print a table, and write needle.json and a heatmap for each kind."""
    from finetune.ask.heatmap import draw_heatmap

    if (args.out / "needle.json").exists():
        raise ValueError(
            f"--out: {args.out / 'needle.json'} exists from an earlier probe, and is not overwritten. Name another "
            f"folder with --out"
        )
    report: dict[str, dict[str, list[dict[str, float]]]] = {}
    for model, kind, cells in _probes(args):
        rows = report.setdefault(kind, {}).setdefault(model, [])
        for cell in cells:
            rows.append(asdict(cell))
            if not args.json:
                place = f"{cell.length:,} tokens, depth {cell.depth:.0%}"
                print(f"{model}, {kind}, {place}: found {cell.found:.2f}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    content = {
        "model": args.model,
        "adapter": str(args.adapter or ""),
        "seed": args.seed,
        "trials": args.trials,
        "kinds": report,
    }
    (args.out / "needle.json").write_text(json.dumps(content, indent=1) + "\n")
    for kind, models in report.items():
        grids = {model: _grid(cells, args) for model, cells in models.items()}
        path = args.out / f"needle-{kind}.png"
        draw_heatmap(grids, lengths=args.lengths, depths=args.depths, title=f"{kind} needles", path=path)
    print(json.dumps(content, indent=1) if args.json else f"wrote {args.out}/needle.json and a heatmap for each kind")
    return 0


def _probes(args: argparse.Namespace) -> Iterator[tuple[str, str, "Iterator[Cell]"]]:
    from finetune.ask.needle import probe

    kinds = ("text", "video") if args.kind == "both" else (args.kind,)
    options = {"lengths": args.lengths, "depths": args.depths, "trials": args.trials, "seed": args.seed}
    speaker = load_speaker(args.model, args, adapter=args.adapter)
    if args.adapter is not None:
        bare = speaker if speaker.switches else load_speaker(args.model, args, adapter=None)
        for kind in kinds:
            yield "base", kind, probe(bare, kind, base=speaker.switches, **options)
    for kind in kinds:
        yield ("adapted" if args.adapter else "model"), kind, probe(speaker, kind, **options)


def _grid(cells: list[dict[str, float]], args: argparse.Namespace) -> list[list[float]]:
    shares = {(cell["length"], cell["depth"]): cell["found"] for cell in cells}
    return [[shares[length, depth] for length in args.lengths] for depth in args.depths]


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
