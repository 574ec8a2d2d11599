"""The ranks of the checkpoint tests: they train a tiny model, save, restore, and return losses and errors."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from tiny_moe import batch, rows_of, token_count, token_loss
from torch import Tensor

from finetune.adapters.provenance import Provenance
from finetune.adapters.write_trained import write_adapter
from finetune.checkpoint.adapter import adapter_writer
from finetune.checkpoint.checkpoints import Checkpoints
from finetune.checkpoint.folder import find_latest
from finetune.checkpoint.manifest import file_fingerprint, read_manifest, write_manifest
from finetune.checkpoint.slices import slices
from finetune.checkpoint.stored import checked
from finetune.files.basefiles import open_base
from finetune.model.build import build
from finetune.model.empty import EmptyModel, ModelOptions
from finetune.model.weights import load_weights
from finetune.ranks.engine import (
    EngineOptions,
    backward,
    engine_config,
    initialize,
    require_step_applied,
    start_distributed,
)
from moe.experts import ExpertLora
from moe.parallel import LayerOptions
from moe.router import RouterOptions

ROWS = 4
SAVED_AT = 2
AFTER = 3
CONFIG = {"optim": {"lr": 1e-3, "betas": (0.9, 0.95)}, "parallel": {"ep": 1}, "run": {"name": "one", "seed": 3}}
STATE = {"data": {"epoch": 1, "step": 4, "quarantine": [[0, {"unit": 7}]]}, "note": "é"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One engine: its starting point, its folder for saves, and the number of training steps."""

    folder: Path
    """The folder for the checkpoints that it writes."""
    ep: int
    dtype: str = "float32"
    """Type of the weights and of the optimiser's moments; with bfloat16, the moments are kept in host memory."""
    resume: Path | None = None
    save: bool = False
    resident: bool = True
    dropout: float = 0.0
    asynchronous: bool = False
    after: int = AFTER


@dataclass(kw_only=True)
class Run:
    """An engine with its model, its checkpoints and its place in the data."""

    engine: Any
    empty: EmptyModel
    checkpoints: Checkpoints
    rank: int
    world: int
    step: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def train(self, steps: int) -> None:
        everything = batch(8 * ROWS)
        begin, end = (rank * ROWS // self.world for rank in (self.rank, self.rank + 1))  # with 3 ranks, one has 2 rows
        for step in range(self.step, self.step + steps):
            total = token_count(everything["input_ids"][step * ROWS : (step + 1) * ROWS])
            mine = rows_of(everything, slice(step * ROWS + begin, step * ROWS + end))
            mine["pixel_values"] = mine["pixel_values"].to(self.engine.module.dtype)
            loss = token_loss(self.engine(**mine, use_cache=False).logits, mine["input_ids"])
            backward(self.engine, loss, total)
            self.engine.step()
            require_step_applied(self.engine, step)
            summed = loss.detach().double()
            dist.all_reduce(summed)
            self.losses.append(summed.item() / total)
            self.norms.append(float(self.engine.get_global_grad_norm()))
        self.step += steps

    def save(self, **changes: Any) -> Path:
        return self.checkpoints.save(**({"step": self.step, "state": STATE, "config": CONFIG} | changes))

    def save_with(self, checkpoints: Checkpoints) -> Path:
        return checkpoints.save(step=3, state=STATE, config=CONFIG)

    def restore(self, path: Path, **changes: Any) -> None:
        resumed = self.checkpoints.restore(path, **({"config": CONFIG} | changes))
        assert resumed.state == STATE
        self.step = resumed.step


def start(rank: int, world: int, base: Path, job: Job, *, train: tuple[str, ...] = ("attention",)) -> Run:
    """Build, load and start the engine: expert LoRA, full attention (with its vectors), full router."""
    start_distributed()
    layer = LayerOptions(
        experts="lora",
        lora=ExpertLora(r=8, alpha=12, dropout=job.dropout),
        router=RouterOptions(mode="full"),
        resident=job.resident,
    )
    dtype = getattr(torch, job.dtype)
    empty = build(base, ModelOptions(ep_size=job.ep, layer=layer, train=train, resident=job.resident, dtype=dtype))
    options = EngineOptions(
        dtype=job.dtype,
        lr=1e-3,
        eps=1e-6,
        clip_norm=0.05,
        weight_decay=0.1,
        moments=job.dtype,
        offload=job.dtype == "bfloat16",
    )
    files = open_base(base, empty.expected)
    load_weights(empty, files, engine_config=engine_config(options))
    engine = initialize(empty.module, options)
    engine.train()
    provenance = Provenance(base=files, base_name="base")
    checkpoints = Checkpoints(
        engine,
        empty,
        job.folder,
        base=files,
        keep=2,
        asynchronous=job.asynchronous,
        adapter_writer=adapter_writer(empty, base="base", provenance=provenance),
    )
    torch.manual_seed(rank)
    return Run(engine=engine, empty=empty, checkpoints=checkpoints, rank=rank, world=world)


def session(rank: int, world: int, base: Path, jobs: list[Job]) -> list[dict[str, list[float]]]:
    """Run the engines in turn; return the losses and norms of the steps after the save or the resume."""
    results = []
    for job in jobs:
        run = start(rank, world, base, job)
        if job.resume is not None:
            torch.manual_seed(100 + rank)
            run.restore(job.resume)
        else:
            run.train(SAVED_AT)
        if job.save:
            run.save()  # an asynchronous save is written while training continues
            write_adapter(run.empty, job.folder / "as-gathered", base="base")
        run.losses.clear()
        run.norms.clear()
        run.train(job.after)
        run.checkpoints.wait()
        results.append({"losses": run.losses, "norms": run.norms})
        run.engine.destroy()
    return results


def troubles(rank: int, world: int, base: Path, other_base: Path, folder: Path, full: Path | None) -> dict[str, str]:
    """Return this rank's error messages for checkpoints that it cannot resume, and for a full disk."""
    run = start(rank, world, base, Job(folder=folder, ep=2))
    run.train(SAVED_AT)
    good = run.save()
    before = masters(run)
    changed = {"optim": {"lr": 2e-3, "betas": [0.9, 0.95], "eps": 1e-6}, "parallel": {"ep": 4}, "run": {"seed": 3}}
    messages = {"config": message(lambda: run.restore(good, config=changed))}
    for name, change in CHANGES.items():
        if rank == 0:
            change(shutil.copytree(good, folder / name))
        dist.barrier()
        messages[name] = message(lambda name=name: run.restore(folder / name))
    if full is not None:
        run.checkpoints.folder = full
        first = run.save()
        if rank == 0:
            size = sum(file.stat().st_size for file in first.iterdir())
            (full / "others").write_bytes(b"x" * (shutil.disk_usage(full).free - size // 2))
        dist.barrier()
        messages["full"] = message(lambda: run.save(step=3))
        dist.barrier()  # rank 0 cleans up after it has sent the error to the other ranks
        behind = Checkpoints(run.engine, run.empty, full, base=run.checkpoints.base, keep=2, asynchronous=True)
        for name, ask in {"poll": behind.poll, "wait": behind.wait, "save": partial(run.save_with, behind)}.items():
            run.save_with(behind)
            while name == "poll" and not messages.get("full, poll", "").startswith("RuntimeError"):
                messages["full, poll"] = message(ask)
            messages[f"full, {name}"] = messages.get(f"full, {name}") or message(ask)
            dist.barrier()
            behind.wait()  # each error is raised only once
        messages["after full"] = f"{sorted(path.name for path in full.iterdir())} {find_latest(full) == first}"
        run.checkpoints.folder = folder
    unchanged = all(torch.equal(before[name], now) for name, now in masters(run).items())
    messages["kept"] = f"{unchanged} {find_latest(folder) == good}"
    run.engine.destroy()
    for name, where, train in (("base", other_base, ("attention",)), ("trained", base, ("attention", "norms"))):
        other = start(rank, world, where, Job(folder=folder, ep=2), train=train)
        messages[name] = message(lambda other=other: other.restore(good))
        messages[f"{name}, old"] = message(lambda other=other: other.restore(folder / "old"))
        other.engine.destroy()
    return messages


def masters(run: Run) -> dict[str, Tensor]:
    return {s.canonical: s.views["master"].clone() for s in slices(run.engine, run.empty)}


def _cut(folder: Path) -> None:
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def _header(folder: Path) -> None:
    """Write wrong bytes into a file, with a checksum that matches them."""
    path, manifest = min(folder.glob("*.safetensors")), read_manifest(folder)
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"!" * 64)
    write_manifest(folder, replace(manifest, files={**manifest.files, path.name: checked(path)}))


def _flip(folder: Path) -> None:
    file = max(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5000] ^= 4
    file.write_bytes(content)


def _edit(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"updates": 2', '"updates": 3', 1))


def _old_fingerprint(folder: Path) -> None:
    """Name the base by the hash that manifests had before they used the fingerprint of adapter files."""
    manifest = read_manifest(folder)
    base = open_base(Path(manifest.base))
    write_manifest(folder, replace(manifest, base_fingerprint=file_fingerprint(base.stored.values())))


def _version(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"version": 2', '"version": 99'))


CHANGES: dict[str, Callable[[Path], None]] = {
    "cut": _cut,
    "missing": lambda folder: max(folder.glob("*.safetensors")).unlink(),
    "header": _header,
    "flip": _flip,
    "edit": _edit,
    "unfinished": lambda folder: (folder / "manifest.json").unlink(),
    "version": _version,
    "old": _old_fingerprint,
}


def killed(rank: int, world: int, base: Path, folder: Path, victim: int, event: str, ending: str) -> None:
    """Save once, then again, and SIGKILL `victim` when it opens or renames a path with this ending."""
    run = start(rank, world, base, Job(folder=folder, ep=2))
    run.train(1)
    run.save()
    run.train(1)

    def watch(what: str, arguments: tuple[Any, ...]) -> None:
        if what == event and any(isinstance(a, (str, Path)) and str(a).endswith(ending) for a in arguments[:2]):
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == victim:
        sys.addaudithook(watch)
    run.save()


def saves_again(rank: int, world: int, base: Path, folder: Path, at: int) -> list[str]:
    """Resume the killed run, save the same steps again, and return the folder's entries."""
    run = start(rank, world, base, Job(folder=folder, ep=2))
    latest = find_latest(folder)
    assert latest is not None
    run.restore(latest)
    assert run.step == at
    for _ in range(3):
        run.train(1)
        run.save()
    run.save()  # a second save of the same step replaces the first
    return sorted(path.name for path in folder.iterdir())


def with_dropout(rank: int, world: int, base: Path, folder: Path) -> list[list[float]]:
    """Return the losses of two steps after a save, and of two steps after a resume."""
    losses = []
    for resume in (None, folder / "step-000001"):
        run = start(rank, world, base, Job(folder=folder, ep=2, dropout=0.5))
        if resume is None:
            run.train(1)
            run.save()
        else:
            torch.manual_seed(1234 + rank)
            run.restore(resume)
        run.train(2)
        losses.append(run.losses[-2:])
        run.engine.destroy()
    return losses


def whole_tensors(folder: Path) -> dict[str, Tensor]:
    """Join a checkpoint's tensors by the offsets in its files, without torch.distributed."""
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for key, offset, tensor in _pieces(folder):
        pieces.setdefault(key, []).append((offset, tensor))
    return {key: torch.cat([t for _, t in sorted(parts, key=lambda f: f[0])]) for key, parts in pieces.items()}


def _pieces(folder: Path) -> Iterator[tuple[str, int, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for key in file.offset_keys():
                yield key, offsets[key]["saved_offsets"][0], file.get_tensor(key)


def message(do: Callable[[], Any]) -> str:
    """Return the error that `do` raises, as text."""
    try:
        do()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"
