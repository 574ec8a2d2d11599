"""One side of the merge benchmark in its own process: time and memory beyond its imports."""

import argparse
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe  # noqa: F401  # importing it is not timed

from benchmarks.harness.memory import AnonymousPeak
from finetune.adapters.export import export
from finetune.adapters.merge import merge
from finetune.adapters.merge_plan import plan_merge
from finetune.adapters.write import OutForm
from finetune.files.basefiles import open_base


def main() -> None:
    """Run one side on BASE and ADAPTER into OUT, and write seconds and peak bytes to RESULT."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    for name in ("base", "adapter", "out", "result"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with AnonymousPeak() as memory:
        start = time.perf_counter()
        SIDES[args.side](args.base, args.adapter, args.out)
        seconds = time.perf_counter() - start
    args.result.write_text(json.dumps({"seconds": seconds, "peak": memory.peak_bytes}))


def _ours(base: Path, adapter: Path, out: Path) -> None:
    merge(plan_merge(open_base(base), adapter), out)


def _peft(base: Path, adapter: Path, out: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out)


def _copy(base: Path, adapter: Path, out: Path) -> None:
    """Copy the base as cp does, synced to the disk like a merge."""
    out.mkdir()
    for path in base.iterdir():
        shutil.copyfile(path, out / path.name)
        handle = os.open(out / path.name, os.O_RDWR)
        os.fsync(handle)
        os.close(handle)


def _export(form: OutForm, adapter: Path, out: Path) -> None:
    export(adapter, out, form=form)


SIDES: dict[str, Callable[[Path, Path, Path], None]] = {
    "ours": _ours,
    "peft": _peft,
    "copy": _copy,
    "export-peft": lambda base, adapter, out: _export("peft", adapter, out),
    "export-per-expert": lambda base, adapter, out: _export("per-expert", adapter, out),
}


if __name__ == "__main__":
    main()
