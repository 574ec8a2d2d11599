"""`moetune harness`: score served models with lmms-eval, a standard harness, the base beside the tuned model."""

import argparse
import json
import sys
from pathlib import Path

from data.format.printable import printable
from launchers.arguments import positive

EXAMPLE = """\
  moetune harness mmmu_val ai2d --model mine-base@http://localhost:8000/v1 --model mine@http://localhost:8000/v1
  moetune harness my_task --tasks-folder tasks --model base@http://a:8000/v1 --model mine@http://b:8000/v1"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("tasks", nargs="+", metavar="TASK", help="names of lmms-eval's tasks")
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        dest="models",
        metavar="NAME@URL",
        help="a model by its name at a server, and the server's address; repeat it, the base first",
    )
    parser.add_argument("--program", default="lmms-eval", help="lmms-eval's program (default: lmms-eval on the PATH)")
    parser.add_argument("--tasks-folder", type=Path, metavar="DIR", help="folder of tasks of your own")
    parser.add_argument("--limit", type=positive, metavar="N", help="ask only the first N questions of each task")
    parser.add_argument("--concurrency", type=positive, default=8, help="requests at a time (default 8)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a request may take (default 600)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("harness"),
        metavar="DIR",
        help="new folder for lmms-eval's files (default harness)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Score each model and print one table; return 1 if a server or lmms-eval fails."""
    from finetune.ask.exchange import EndpointError
    from finetune.serving.harness import command, here, score, served_model, table

    models = [served_model(word) for word in args.models]
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(
            f"--out {args.out} is not empty, and older scores there could be taken for new ones: name another"
        )
    scores = []
    try:
        for number, model in enumerate(models, start=1):
            out = (args.out / f"{number}-{model.name.replace('/', '-')}").absolute()
            words = command(
                args.program,
                model,
                args.tasks,
                out,
                tasks_folder=args.tasks_folder,
                limit=args.limit,
                timeout=args.timeout,
                concurrency=args.concurrency,
            )
            print(printable(f"{model.name} at {model.url}: lmms-eval writes to {out}"), file=sys.stderr, flush=True)
            scores.append(score(words, out, here()))
    except EndpointError as error:
        if args.debug:
            raise
        print(printable(f"moetune harness: {error}"), file=sys.stderr)
        return 1
    names = [model.name for model in models]
    if args.json:
        values = [
            {"model": model.name, "url": model.url, "scores": dict(one.values)}
            for model, one in zip(models, scores, strict=True)
        ]
        print(json.dumps(values, indent=2))
    else:
        print("\n".join(table(names, scores)))
    return 0
