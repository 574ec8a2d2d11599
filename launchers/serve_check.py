"""`moetune serve-check`: compare a live server with our own computation, from pixels to log-probabilities."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from data.format.printable import count_of, printable
from launchers.arguments import (
    answer_config,
    load_speaker,
    media_places,
    model_arguments,
    place_arguments,
    positive,
)

if TYPE_CHECKING:
    from finetune.ask.endpoint import Endpoint

EXAMPLE = """\
  moetune serve-check http://localhost:8000/v1 shards/held-out --model merged --samples 16
  moetune serve-check http://localhost:8000/v1 held-out.jsonl --model base --adapter runs/mine/adapter --name mine"""

ATTEMPTS = 3
"""Requests to a busy server before it is given up, and timeouts of one that hangs."""
EXIT_CODES = {3: "the server's results differ, or nothing could be compared"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("url", metavar="URL", help="a server with OpenAI's protocol, such as http://host:8000/v1")
    parser.add_argument("data", nargs="+", metavar="DATA", help="shards, a .jsonl or a .json file")
    parser.add_argument("--model", required=True, help="the model that the server serves: a folder or a hub id")
    check_arguments(parser)
    parser.add_argument("--name", default="", help="the model's name on the server (default: its only one)")
    parser.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the server's key (default OPENAI_API_KEY)",
    )


def check_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of a comparison, whatever names the server and the data."""
    model_arguments(parser)
    parser.add_argument("--samples", type=positive, default=8, help="samples drawn from each source (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of drawing (default 0)")
    parser.add_argument("--max-tokens", type=positive, default=32, help="longest answer, in tokens (default 32)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        help="largest difference allowed between log-probabilities (default 0.1, for bfloat16)",
    )
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that a request may take (default 300)")
    place_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Compare and print a card with the first difference; return 3 if there is one, 1 if the server fails."""
    from finetune.ask.endpoint import Endpoint
    from finetune.ask.exchange import EndpointError

    endpoint = Endpoint(
        url=args.url,
        model=args.name,
        key_variable=args.key_variable,
        timeout=args.timeout,
        attempts=ATTEMPTS,
    )
    try:
        return check(args, endpoint, model=args.model, adapter=args.adapter)
    except EndpointError as error:
        if args.debug:
            raise
        print(printable(f"moetune serve-check: {error}"), file=sys.stderr)
        return 1


def check(args: argparse.Namespace, endpoint: "Endpoint", *, model: str, adapter: Path | None) -> int:
    """Compare a server with a model, print a card and return the exit code; `args` are those of `check_arguments`."""
    from finetune.ask.answers import find_questions, with_media
    from finetune.ask.endpoint import check_sendable
    from finetune.files.hub import model_folder

    if not args.tolerance >= 0:
        raise ValueError(f"--tolerance must be at least 0, got {args.tolerance}; 0.1 is usual for bfloat16")
    questions, reader = find_questions(args.data, limit=args.samples, seed=args.seed, places=media_places(args))
    for question in questions:
        check_sendable(question.record)
    shown = with_media(questions, reader, control="kept", seed=args.seed)
    endpoint.model_name()  # a server that is not there is known before a model is loaded
    speaker = load_speaker(model, args, adapter=adapter)
    from finetune.adapters.media import rules_of, trained_rules
    from finetune.ask.serve_check import serve_check

    folder = model_folder(model)
    limits = {"tolerance": args.tolerance, "max_tokens": args.max_tokens}
    differs = rules_of(folder).differences(trained_rules(folder, answer_config(args, model).data))
    note = f"the processor files of {folder} say {'; '.join(differs)} as in training" if differs else ""
    *_, card = serve_check(speaker, endpoint, shown, **limits, note=note)
    if args.json:
        print(json.dumps(asdict(card), indent=2))
    else:
        print("\n".join(card.lines()))
        if card.differences:
            print(printable(f"{count_of(len(card.differences), 'difference')}; the first: {card.differences[0]}"))
        elif not any(card.compared.values()):
            print("nothing could be compared: the server returns neither token ids nor log-probabilities")
    return 3 if card.differences or not any(card.compared.values()) else 0
