"""`moetune eval`: ask a model or a server held-out questions, and score the answers by source."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.format.printable import printable
from launchers.arguments import endpoint_of, load_speaker, media_places, model_arguments, place_arguments, positive

if TYPE_CHECKING:
    from finetune.ask.answers import Respond, Row, Scored

EXAMPLE = """\
  moetune eval shards/held-out --model base --adapter runs/mine/adapter --metric exact --out answers.jsonl
  moetune eval docs=shards/docs boxes=shards/boxes --model merged --metric docs=anls --metric boxes=iou@0.5
  moetune eval shards/held-out --url http://localhost:8000/v1 --metric choice --concurrency 16
  moetune eval shards/held-out --model merged --media shuffled --at-most exact=0.25     # does it look at all?
  moetune eval held-out.jsonl --model merged --metric my_metrics:close_enough"""

EXIT_CODES = {3: "a score missed the bound of --at-least or --at-most"}


SHOWN = 5
"""Skipped samples that are named; --json names all."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument(
        "data", nargs="+", metavar="DATA", help="shards, a .jsonl or a .json file; NAME=PATH names the source"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a base or merged model: a folder or a hub id")
    source.add_argument("--url", help="a server with OpenAI's protocol, such as http://host:8000/v1")
    model_arguments(parser)
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="METRIC",
        help="a metric for all sources, or SOURCE=METRIC for one; may be repeated (default exact)",
    )
    parser.add_argument(
        "--skip-unfit",
        action="store_true",
        help="skip samples whose reference a metric cannot read, and count them",
    )
    parser.add_argument(
        "--media",
        choices=("kept", "shuffled", "blank"),
        default="kept",
        help="show other media (shuffled) or grey pictures (blank), to see whether the model uses them (default kept)",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="ask only N samples of each source, drawn by --seed"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of drawing, shuffling and sampling (default 0)")
    parser.add_argument("--max-tokens", type=positive, default=256, help="longest answer, in tokens (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) always takes the likeliest token")
    parser.add_argument(
        "--batch", type=positive, default=8, help="prompts that a local model takes at once (default 8)"
    )
    parser.add_argument("--concurrency", type=positive, default=8, help="requests at a time to a server (default 8)")
    parser.add_argument("--name", default="", help="the model's name on the server (default: its only one)")
    parser.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the server's key (default OPENAI_API_KEY)",
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a request may take (default 600)")
    parser.add_argument(
        "--attempts", type=positive, default=5, help="attempts while a server is busy or down (default 5)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write every answer with its scores, one JSON object per line"
    )
    for name, about in (("least", "below"), ("most", "above")):
        parser.add_argument(
            f"--at-{name}",
            action="append",
            default=[],
            metavar="METRIC=X",
            help=f"exit code 3 if the metric's mean over all samples is {about} X",
        )
    place_arguments(parser)
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="folder for indexes, if the folder of DATA is not writable"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Ask, score, and print the table; return 3 if a bound is missed, 1 if the server fails."""
    from finetune.ask import answers
    from finetune.ask.exchange import EndpointError
    from finetune.ask.scores import find_metric

    if args.out is not None and (args.out.is_dir() or not args.out.absolute().parent.is_dir()):
        raise ValueError(f"--out must be a file in a folder that exists, got {args.out}")
    for word in args.metric:  # refuse unknown names before anything is read
        find_metric(word.rpartition("=")[2])
    questions, reader = answers.find_questions(
        args.data, limit=args.limit, seed=args.seed, cache_dir=args.cache_dir, places=media_places(args)
    )
    metrics = answers.metrics_of(args.metric, sorted({question.source for question in questions}))
    bounds = _bounds(args, {name for named in metrics.values() for name in named})
    questions, unfit = answers.require_fit(questions, metrics, skip=args.skip_unfit)
    respond = _respond(args, [question.record for question in questions])
    shown = answers.with_media(questions, reader, control=args.media, seed=args.seed)
    try:
        scored = _collect(answers.ask_all(questions, shown, respond, metrics), len(questions), args.out)
    except EndpointError as error:
        if args.debug:
            raise
        print(printable(f"moetune eval: {error}"), file=sys.stderr)
        return 1
    rows = answers.table(scored)
    missed = [text for text in (bound(rows[-1]) for bound in bounds) if text]
    _print(args, rows, missed, answers.table_lines(rows), unfit)
    return 3 if missed else 0


def _respond(args: argparse.Namespace, records: Sequence[Any]) -> "Respond":
    if args.url is None:
        from finetune.ask.local import local
        from finetune.ask.speaker import Sampling

        sampling = Sampling(max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
        return local(load_speaker(args.model, args, adapter=args.adapter), sampling, batch=args.batch)
    from finetune.ask.endpoint import check_sendable, remote

    ignored = [f"--{name}" for name, value in (("adapter", args.adapter), ("config", args.config)) if value]
    if ignored or args.settings:
        raise ValueError(f"{(ignored or ['--set'])[0]} applies only to --model; the server at --url has its own")
    for record in records:
        check_sendable(record)
    options = {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed}
    return remote(endpoint_of(args), options)


def _collect(answers: Iterable["Scored"], total: int, out: Path | None) -> list["Scored"]:
    """Collect answers as they arrive; each is on disk before the next one is awaited."""
    from contextlib import nullcontext

    from data.prepare.progress import Progress

    scored = []
    with Progress("asked", total, unit="questions") as progress, out.open("w") if out else nullcontext() as file:
        for item in answers:
            scored.append(item)
            if file is not None:
                file.write(json.dumps(item.to_json(), ensure_ascii=False) + "\n")
                file.flush()
            progress(len(scored))
    return scored


def _bounds(args: argparse.Namespace, known: set[str]) -> list[Any]:
    """Return one function per bound: it describes how the last row misses the bound, or returns ""."""
    bounds = []
    for option, words in (("--at-least", args.at_least), ("--at-most", args.at_most)):
        for word in words:
            name, _, limit = word.rpartition("=")
            try:
                number = float(limit)
            except ValueError:
                number = -1.0
            if name not in known or not 0 <= number <= 1:
                raise ValueError(
                    f"{option} {word}: write METRIC=X, with X from 0 to 1 and METRIC one of {', '.join(sorted(known))}"
                )
            bounds.append(_bound(name, number, option))
    return bounds


def _bound(name: str, limit: float, option: str) -> Any:
    def check(row: "Row") -> str:
        score = row.scores[name]
        fine = score >= limit if option == "--at-least" else score <= limit
        return "" if fine else f"{name} is {score:.4f} over all samples, {option} {limit:g}"

    return check


def _print(
    args: argparse.Namespace,
    rows: Sequence["Row"],
    missed: Sequence[str],
    lines: Sequence[str],
    unfit: Mapping[tuple[Path, str], str],
) -> None:
    from data.format.printable import count_of
    from finetune.ranks.log import listed

    if args.json:
        left_out = [{"shard": str(shard), "key": key, "reason": reason} for (shard, key), reason in unfit.items()]
        table = [
            {"source": row.source, "samples": row.samples, "cut": row.cut, "scores": dict(row.scores)} for row in rows
        ]
        answer = {"media": args.media, "rows": table, "missed": list(missed), "left_out": left_out}
        print(json.dumps(answer, indent=2))
        return
    print("\n".join(lines))
    if unfit:
        names = listed([f"{shard.name} {key}" for shard, key in unfit], SHOWN)
        print(
            f"skipped, since a metric cannot read the reference: {count_of(len(unfit), 'sample')} ({names}). The first:"
        )
        print(printable(f"    {next(iter(unfit.values()))}"))
    if cut := rows[-1].cut:
        print(f"answers cut at --max-tokens {args.max_tokens}: {cut:,} of {rows[-1].samples:,}")
    for text in missed:
        print(printable(f"missed: {text}"))
