"""`moetune serve`: the exact command of each server for what was trained; or start one, wait, and check it."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.serve_check import check, check_arguments

if TYPE_CHECKING:
    from finetune.serving.commands import Served, ServerName
    from finetune.serving.memory import ServerMemory

EXAMPLE = """\
  moetune serve runs/mine                                    # the commands of vLLM, sglang and transformers
  moetune serve merged --gpu h100-80gb                       # a merged folder, over as many GPUs as it needs
  moetune serve base --adapter runs/mine/adapter --run --data held-out.jsonl"""

EXIT_CODES = {3: "the server computes something else than training, or none can take the adapter as it is"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a run, a model folder, or an adapter's folder")
    parser.add_argument("--server", choices=("vllm", "sglang", "transformers"), help="only this one (default: each)")
    parser.add_argument("--name", default="mine", help="the model's name at the server (default mine)")
    parser.add_argument("--length", type=int, metavar="TOKENS", help="longest context to serve (default: as trained)")
    parser.add_argument("--gpu", default="", metavar="KIND", help="as in `moetune plan`: over how many to spread it")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default 8000)")
    parser.add_argument(
        "--run", dest="start", action="store_true", help="start the first server that is installed, and check it"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="DATA",
        help="with --run: held-out samples (default: those of the run's eval.sources)",
    )
    parser.add_argument("--start-seconds", type=float, default=1800.0, help="until it must be ready (default 1800)")
    parser.add_argument("--keep", action="store_true", help="with --run: go on serving after the check, until Ctrl-C")
    check_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the commands, or start a server and compare it; 1 if it does not start or fails."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the engine's library would search for a GPU, and say so
    from finetune.serving.commands import SERVERS, find_served, held_out, is_installed, obstacles
    from finetune.serving.memory import server_memory

    if args.start:
        args.data = args.data or held_out(args.folder)
        if not args.data:
            raise ValueError(
                f"--run compares the server with training, and {args.folder} names no held-out samples "
                f"(eval.sources of a run): give some with --data"
            )
    served = find_served(args.folder, args.adapter, name=args.name)
    servers: Sequence[ServerName] = (args.server,) if args.server else SERVERS
    memory = server_memory(served, kind=args.gpu, length=args.length, dtype=args.dtype)
    print("\n".join(memory.lines()), flush=True)
    if not args.start:
        return 0 if any([_print(args, served, memory, server) for server in servers]) else 3
    able = [name for name in servers if not obstacles(served, name) and memory.suits(name) and is_installed(name)]
    if not able:
        raise ValueError(
            f"--run found none of {', '.join(servers)} that takes it: no program vllm, and no other in "
            f"{sys.executable}. Install one, or start the server yourself (without --run the commands are printed) "
            f"and use `moetune serve-check`"
        )
    return _start(args, served, memory, able[0])


def _words(args: argparse.Namespace, served: "Served", memory: "ServerMemory", server: "ServerName") -> list[str]:
    from finetune.serving.commands import command

    words = command(served, server, port=args.port, length=args.length, dtype=args.dtype)
    return words + memory.flags(server)


def _print(args: argparse.Namespace, served: "Served", memory: "ServerMemory", server: "ServerName") -> bool:
    """Print how a server is started, or why it cannot take the model and what to do; say whether it can."""
    from finetune.serving.commands import obstacles

    print(f"\n{server}")
    problems = obstacles(served, server)
    if problems:
        assert served.adapter is not None
        print(f"  cannot serve this adapter as it is: {'; '.join(problems)}. Merge it, and serve the merged folder:")
        print(f"  moetune merge {shlex.quote(str(served.model))} {shlex.quote(str(served.adapter.folder))} merged")
        print("  moetune serve merged")
        return False
    if not memory.suits(server):
        print(f"  cannot serve it on {args.gpu}: this endpoint uses one GPU, and the model needs {memory.gpus}")
        return False
    print(f"  {shlex.join(_words(args, served, memory, server))}")
    return True


def _start(args: argparse.Namespace, served: "Served", memory: "ServerMemory", server: "ServerName") -> int:
    """Start a server, compare it, and end it."""
    from finetune.ask.exchange import EndpointError
    from finetune.serving.process import running

    words = _words(args, served, memory, server)
    log = Path(f"moetune-serve-{server}.log").absolute()
    words = [sys.executable if word == "python" else word for word in words]  # this one has the server
    print(f"$ {shlex.join(words)}\nits output goes to {log}", flush=True)
    try:
        with running(
            words, port=args.port, names=[args.name], log=log, environment=os.environ, seconds=args.start_seconds
        ) as running_server:
            print(f"ready at {running_server.url}", flush=True)
            adapter = served.adapter.folder if served.adapter is not None else None
            endpoint = running_server.endpoint(args.name, timeout=args.timeout)
            code = check(args, endpoint, model=str(served.model), adapter=adapter)
            if args.keep and code == 0:
                print(f"serving {args.name} at {running_server.url} until Ctrl-C", flush=True)
                running_server.process.wait()
                running_server.require_alive()
            return code
    except EndpointError as error:
        if args.debug:
            raise
        print(f"moetune serve: {error}", file=sys.stderr)
        return 1
