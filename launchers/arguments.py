"""Arguments that several commands have: the model to ask, the server to ask, counts."""

import argparse
import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.shards.bytes import Places
    from finetune.ask.endpoint import Endpoint
    from finetune.ask.speaker import Speaker
    from finetune.config import RunConfig


def place_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where media outside of the shards may be: the keys of `data:` as flags."""
    parser.add_argument(
        "--media-root", type=Path, metavar="DIR", help="folder where relative paths of media start (data.media_root)"
    )
    parser.add_argument(
        "--allow-private-addresses",
        action="store_true",
        help="urls of media may name servers of your own network (data.allow_private_addresses)",
    )


def media_places(args: argparse.Namespace) -> "Places":
    """Return what `place_arguments` declared."""
    from data.shards.bytes import Places

    return Places(root=args.media_root, allow_private=args.allow_private_addresses)


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of a command that loads a model to ask it; the model is the command's own argument."""
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="folder of an adapter on top of the model")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto (default): a GPU when there is one")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="type of weights and arithmetic; auto (default): float32 on a CPU, bfloat16 on a GPU",
    )
    parser.add_argument(
        "--layout", default="auto", help="how the files store experts: auto (default), hub, memory or per_expert"
    )
    parser.add_argument(
        "--config",
        default="",
        metavar="CONFIG",
        help="recipe with data.image, data.video, data.chat and context (default: what the adapter was trained with)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="change one of these settings: --set data.image.max_tokens=1024",
    )
    parser.add_argument("--other-base", action="store_true", help="accept an adapter that was trained on another base")


def answer_config(args: argparse.Namespace, model: str) -> "RunConfig":
    """Return how images, videos and conversations become tokens: as in training, changed by the recipe and --set."""
    from finetune.adapters.provenance import SEEN
    from finetune.files.hub import model_folder
    from finetune.settings.recipes import load_recipe

    allowed = [f"{section}.{key}" for section, keys in SEEN.items() for key in keys]
    for word in args.settings:
        if not word.startswith(tuple(allowed)):
            raise ValueError(f"--set {word} would change nothing here; what counts is {', '.join(allowed)}")
    config, problems = load_recipe(args.config, args.settings, below=_trained_with(args.adapter, model_folder(model)))
    if problems:
        raise ValueError("\n".join(map(str, problems)))
    return config


def _trained_with(adapter: Path | None, model: Path) -> tuple[dict[str, Any], str]:
    """Return what an adapter of ours was trained with; without one, what the adapter merged into the model was."""
    from finetune.adapters.merge_plan import merge_settings
    from finetune.adapters.provenance import seen_settings
    from finetune.files.tensorfile import read_header

    weights = adapter / "adapter_model.safetensors" if adapter is not None else None
    seen = seen_settings(read_header(weights)[1]) if weights is not None and weights.is_file() else {}
    return seen or merge_settings(model), f"the configuration in {adapter if seen else model}"


def load_speaker(model: str, args: argparse.Namespace, *, adapter: Path | None) -> "Speaker":
    """Load the model; what libraries print when they are first loaded goes to standard error."""
    config = answer_config(args, model)
    with redirect_stdout(sys.stderr):
        device = _device(args.device)
        from finetune.ask.open_model import open_speaker

        return open_speaker(
            model,
            adapter=adapter,
            config=config,
            device=device,
            dtype=args.dtype,
            layout=args.layout,
            other_base=args.other_base,
        )


def _device(name: str) -> str:
    """Return the device, before the engine's library looks for one by itself."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device is {name!r}; allowed are auto, cpu, cuda, or one GPU by its number, as cuda:1")
    import torch

    if name == "auto":
        accelerator = os.environ.get("DS_ACCELERATOR", "cuda")  # the engine's own variable: the user's choice
        name = "cuda" if accelerator == "cuda" and torch.cuda.is_available() else "cpu"
    os.environ["DS_ACCELERATOR"] = name.partition(":")[0]
    return name


def positive(text: str) -> int:
    """Read a count from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it must be a whole number from 1, found {text!r}")
    return int(text)


def endpoint_of(args: argparse.Namespace) -> "Endpoint":
    """Return the server that the arguments name."""
    from finetune.ask.endpoint import Endpoint

    return Endpoint(
        url=args.url,
        model=args.name,
        key_variable=args.key_variable,
        timeout=args.timeout,
        attempts=args.attempts,
        concurrency=args.concurrency,
    )
