"""One rank of `ckpt-save`: an engine with full experts, saved in our way and by torch.save, restored and compared."""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.measure import OutputsDiffer
from finetune.basefiles import open_base
from finetune.checkpoint import Checkpoints
from finetune.checkpoint_slices import Slice, slices
from finetune.engine import EngineOptions, engine_config, initialize, start_distributed
from finetune.model import ModelOptions, build
from finetune.weights import load
from moe.parallel import LayerOptions

ROUNDS = 5


def main() -> None:
    """Time saves and a restore that must bring every bit back; rank R writes OUT.R."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("save",))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start_distributed()
    options = EngineOptions(dtype="float32")
    layer = LayerOptions(experts="full", resident=True)
    empty = build(args.folder, ModelOptions(ep_size=2, layer=layer, dtype=torch.float32))
    files = open_base(args.folder, empty.expected)
    load(empty, files, engine_config=engine_config(options))
    engine = initialize(empty.module, options)
    checkpoints = Checkpoints(engine, empty, args.out.parent / "checkpoints", base=files, keep=1)
    held = slices(engine, empty)
    for slice_ in held:
        for view in slice_.views.values():
            view.copy_(torch.rand_like(view))
    ours = [_timed(partial(checkpoints.save, step=step, state={}, config={})) for step in range(ROUNDS)]
    peer = [_timed(lambda: _torch_save(held, args.out.parent / f"peer-{dist.get_rank()}")) for _ in range(ROUNDS)]
    last = args.out.parent / "checkpoints" / f"step-{ROUNDS - 1:06d}"
    size = sum(file.stat().st_size for file in last.iterdir())
    wanted = [[view.clone() for view in slice_.views.values()] for slice_ in held]
    for slice_ in held:
        for view in slice_.views.values():
            view.zero_()
    restore = _timed(lambda: checkpoints.restore(last, config={}))
    for slice_, views in zip(held, wanted, strict=True):
        if not all(map(torch.equal, slice_.views.values(), views)):
            raise OutputsDiffer(f"{slice_.canonical} came back changed")
    state = sum(view.numel() * view.element_size() for slice_ in held for view in slice_.views.values())
    found = {"ours": ours, "peer": peer, "restore": restore, "bytes": size, "state_bytes": state}
    args.out.with_suffix(f".{dist.get_rank()}").write_text(json.dumps(found))


def _timed(do: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def _torch_save(held: list[Slice], path: Path) -> None:
    with path.open("wb") as file:
        torch.save({slice_.canonical: {k: v.clone() for k, v in slice_.views.items()} for slice_ in held}, file)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
