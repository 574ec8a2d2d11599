"""Arguments of commands that load a model to ask it: what on which base, where, with which data settings."""

import argparse
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.config import DataConfig
    from finetune.generate import Speaker

_SEEN = ("data.image.", "data.video.", "data.chat.")


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them; the model itself is the command's own."""
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter on top of the model")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto (default): a GPU when there is one")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of weights and arithmetic; auto (default): float32 on a CPU, bfloat16 on a GPU",
    )  # fmt: skip
    parser.add_argument("--layout", default="auto", help="how the files hold experts: auto, hub, memory, per_expert")
    parser.add_argument("--config", default="", help="take data.image, data.video and data.chat from this recipe")
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="KEY=VALUE",
        help="one of those settings: --set data.image.max_tokens=1024",
    )  # fmt: skip


def data_settings(args: argparse.Namespace) -> "DataConfig":
    """How images, videos and conversations become tokens: as the recipe and the settings say, else the base's own."""
    from finetune.recipes import load

    for word in args.settings:
        if not word.startswith(_SEEN):
            raise ValueError(f"--set {word} would change nothing here; what counts is {', '.join(_SEEN)}...")
    config, problems = load(args.config, args.settings)
    if problems:
        raise ValueError("\n".join(map(str, problems)))
    return config.data


def load_speaker(model: str, args: argparse.Namespace, *, adapter: Path | None) -> "Speaker":
    """Load the model; what libraries say when they are first loaded goes to standard error."""
    settings = data_settings(args)
    with redirect_stdout(sys.stderr):
        device = _device(args.device)
        from finetune.generate import open_speaker

        return open_speaker(
            model, adapter=adapter, data=settings, device=device, dtype=args.dtype, layout=args.layout
        )  # fmt: skip


def _device(name: str) -> str:
    """The device, settled before the engine's library looks for one by itself."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(name).type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return name
