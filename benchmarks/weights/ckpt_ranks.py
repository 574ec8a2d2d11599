"""One rank of `ckpt-save`: save an engine with full experts in our ways and in torch's, restore it and compare."""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import async_save

from benchmarks.harness.measure import OutputsDiffer
from finetune.checkpoint.checkpoints import Checkpoints
from finetune.checkpoint.slices import Slice, slices
from finetune.files.basefiles import open_base
from finetune.model.build import build
from finetune.model.empty import ModelOptions
from finetune.model.weights import load_weights
from finetune.ranks.engine import EngineOptions, engine_config, initialize, start_distributed
from moe.parallel import LayerOptions

ROUNDS = 5


def main() -> None:
    """Time saves, and a restore that must reproduce every bit; rank R writes OUT.R."""
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
    load_weights(empty, files, engine_config=engine_config(options))
    engine = initialize(empty.module, options)
    beside = args.out.parent
    made = {
        kind: Checkpoints(engine, empty, beside / kind, base=files, keep=1, asynchronous=kind == "behind")
        for kind in ("now", "behind")
    }
    pieces = slices(engine, empty)
    _fill(pieces)
    ours = [_timed(partial(made["now"].save, step=step, state={}, config={})) for step in range(ROUNDS)]
    peer = [_timed(lambda: _torch_save(pieces, beside / f"peer-{dist.get_rank()}")) for _ in range(ROUNDS)]
    last = beside / "now" / f"step-{ROUNDS - 1:06d}"
    size = sum(file.stat().st_size for file in last.iterdir())
    restore = _restored(made["now"], last, pieces, _copy(pieces))
    stalls = _stalls(made["behind"], pieces)
    peer_stalls = _torch_stalls(pieces, beside)
    state = sum(view.numel() * view.element_size() for piece in pieces for view in piece.views.values())
    results = {"ours": ours, "peer": peer, "restore": restore, "bytes": size, "state_bytes": state}
    results |= {"stalls": stalls, "peer_stalls": peer_stalls}
    args.out.with_suffix(f".{dist.get_rank()}").write_text(json.dumps(results))


def _stalls(checkpoints: Checkpoints, pieces: list[Slice]) -> list[float]:
    """Return the seconds for which asynchronous saves block the run; later changes must not reach the files."""
    stalls = []
    for step in range(ROUNDS):
        saved = _copy(pieces)
        stalls.append(_timed(partial(checkpoints.save, step=step, state={}, config={})))
        _fill(pieces)
        checkpoints.wait()
    _restored(checkpoints, checkpoints.folder / f"step-{ROUNDS - 1:06d}", pieces, saved)
    return stalls


def _torch_stalls(pieces: list[Slice], folder: Path) -> list[float]:
    """Return the same for torch's own asynchronous save, with each rank's slices under separate names."""
    group = dist.new_group(backend="gloo")
    rank, stalls = dist.get_rank(), list[float]()
    state: Mapping[str, Any] = {f"{rank}/{kind}/{s.canonical}": view for s in pieces for kind, view in s.views.items()}
    for step in range(ROUNDS):
        writer = FileSystemWriter(folder / f"torch-{step}")
        dist.barrier()
        start = time.perf_counter()
        saved: Any = async_save(dict(state), storage_writer=writer, process_group=group)
        stalls.append(time.perf_counter() - start)
        getattr(saved, "upload_completion", saved).result()
    return stalls


def _restored(checkpoints: Checkpoints, path: Path, pieces: list[Slice], expected: list[list[Tensor]]) -> float:
    """Return the seconds of a restore, which must reproduce the expected values."""
    for piece in pieces:
        for view in piece.views.values():
            view.zero_()
    seconds = _timed(lambda: checkpoints.restore(path, config={}))
    for piece, views in zip(pieces, expected, strict=True):
        if not all(map(torch.equal, piece.views.values(), views)):
            raise OutputsDiffer(f"{piece.canonical} has other values after the restore")
    return seconds


def _fill(pieces: list[Slice]) -> None:
    for piece in pieces:
        for view in piece.views.values():
            view.copy_(torch.rand_like(view))


def _copy(pieces: list[Slice]) -> list[list[Tensor]]:
    return [[view.clone() for view in piece.views.values()] for piece in pieces]


def _timed(do: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def _torch_save(pieces: list[Slice], path: Path) -> None:
    with path.open("wb") as file:
        torch.save({piece.canonical: {k: v.clone() for k, v in piece.views.items()} for piece in pieces}, file)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
