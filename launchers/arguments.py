"""Arguments that several commands share: the model or server to ask, places of media, and counts."""

import argparse
import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.rows.columns import Columns
    from data.shards.bytes import Places
    from finetune.ask.endpoint import Endpoint
    from finetune.ask.speaker import Speaker
    from finetune.config import RunConfig


def place_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags for media outside the shards; each stands for a key of `data:`."""
    parser.add_argument(
        "--media-root", type=Path, metavar="DIR", help="folder where relative paths of media start (data.media_root)"
    )
    parser.add_argument(
        "--allow-private-addresses",
        action="store_true",
        help="allow urls of media on servers of your own network (data.allow_private_addresses)",
    )


def mapped_columns(args: argparse.Namespace) -> "Columns":
    """Return what the flags `--map NAME=COLUMN` say."""
    from data.rows.columns import Columns

    words = [word.partition("=") for word in args.map]
    return Columns.of({name: columns.split(",") for name, _, columns in words})


def media_places(args: argparse.Namespace) -> "Places":
    """Return the places of media that the flags of `place_arguments` set."""
    from data.shards.bytes import Places

    return Places(root=args.media_root, allow_private=args.allow_private_addresses)


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options for loading a model to ask; each command declares the model itself."""
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="folder of an adapter for the model")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto (default): a GPU if there is one")
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
        help="recipe with data.image, data.video, data.chat and context (default: those of the adapter's training)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="change one of these settings, for instance data.image.max_tokens=1024",
    )
    parser.add_argument("--other-base", action="store_true", help="accept an adapter that was trained on another base")


def answer_config(args: argparse.Namespace, model: str) -> "RunConfig":
    """Return the settings of images, videos and conversations: those of training, changed by the recipe and --set."""
    from finetune.adapters.provenance import SEEN
    from finetune.files.hub import model_folder
    from finetune.settings.recipes import load_recipe

    allowed = [f"{section}.{key}" for section, keys in SEEN.items() for key in keys]
    for word in args.settings:
        if not word.startswith(tuple(allowed)):
            raise ValueError(
                f"--set {word} would have no effect here; the keys with an effect are {', '.join(allowed)}"
            )
    config, problems = load_recipe(args.config, args.settings, below=_trained_with(args.adapter, model_folder(model)))
    if problems:
        raise ValueError("\n".join(map(str, problems)))
    return config


def _trained_with(adapter: Path | None, model: Path) -> tuple[dict[str, Any], str]:
    """Return the training settings of our adapter; without an adapter, those of the adapter merged into the model."""
    from finetune.adapters.merge_plan import merge_settings
    from finetune.adapters.provenance import seen_settings
    from finetune.files.tensorfile import read_header

    weights = adapter / "adapter_model.safetensors" if adapter is not None else None
    seen = seen_settings(read_header(weights)[1]) if weights is not None and weights.is_file() else {}
    return seen or merge_settings(model), f"the configuration in {adapter if seen else model}"


def load_speaker(model: str, args: argparse.Namespace, *, adapter: Path | None) -> "Speaker":
    """Load the model. The output of libraries as they are imported goes to standard error."""
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
    """Return the device, and set it before DeepSpeed is imported, which would search for one by itself."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device must be auto, cpu, cuda, or one GPU by its number, such as cuda:1; got {name!r}")
    import torch

    if name == "auto":
        accelerator = os.environ.get("DS_ACCELERATOR", "cuda")  # DeepSpeed's own variable, which a user may set
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
