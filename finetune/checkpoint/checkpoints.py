"""Save and restore checkpoints: each rank writes its own slices without a gather; any number of ranks reads them back.

torch.distributed.checkpoint writes tensors to safetensors files; everything else goes to a JSON manifest. A save is
written and synced in a temporary folder, then renamed, and LATEST is updated last: an interrupted save is never
resumed. It contains trainable tensors only; the frozen base is identified by name and fingerprint.

An asynchronous save copies the slices to the host and returns; a thread on each rank writes the copies while training
continues. The threads have their own process group, so that their collectives never mix with those of the engine.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from finetune.checkpoint.adapter import AdapterWriter
from finetune.checkpoint.folder import find_latest, make_room, point_and_prune
from finetune.checkpoint.manifest import (
    File,
    Manifest,
    Trained,
    config_hash,
    read_manifest,
    require_same_run,
    write_manifest,
)
from finetune.checkpoint.pieces import Meshes, flat_tensors, read, require_whole, write
from finetune.checkpoint.slices import Slice, put_in_service, slices
from finetune.checkpoint.stored import checked, require_intact
from finetune.files.atomic import whole_folder
from finetune.files.basefiles import BaseFiles
from finetune.files.fingerprint import fingerprint
from finetune.model.empty import EmptyModel
from finetune.ranks.collectives import PATIENCE
from finetune.ranks.engine import take_device
from finetune.ranks.hooks import keep_whole
from finetune.ranks.log import listed
from moe.host import HostCopy, HostMemory

T = TypeVar("T")
BLOCK_BYTES = 1 << 28
"""Bytes per block of host memory for the copies of slices, each of which takes megabytes."""


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """The point where a restored run continues; `state` is the one that was passed to `save`."""

    path: Path
    step: int
    ranks: int
    state: dict[str, Any]
    config: Mapping[str, Any]
    """The configuration of the run that was saved."""


@dataclass(frozen=True, kw_only=True)
class _Save:
    """Everything that a save writes; nothing in it changes during the write."""

    final: Path
    slices: list[Slice]
    random: dict[str, Tensor]
    manifest: Manifest
    is_best: bool


class Checkpoints:
    """The checkpoints of one run in `folder` (`step-000120`, ...): the newest `keep`, the best one, and LATEST.

    Every rank must create one and call its methods at the same points. Errors are the same on all ranks.
    `adapter_writer` runs on rank 0 and adds an adapter, made from the checkpoint's tensors.
    """

    def __init__(
        self,
        engine: Any,
        empty: EmptyModel,
        folder: Path,
        *,
        base: BaseFiles,
        keep: int = 3,
        asynchronous: bool = False,
        adapter_writer: AdapterWriter | None = None,
        busy: Callable[[bool], None] = lambda _: None,
    ) -> None:
        """`busy` is called with True when this rank starts file work, and with False when it may wait for others."""
        assert keep >= 1
        self._busy = busy
        self.engine = engine
        self.empty = empty
        self.folder = folder
        self.base = base
        self.keep = keep
        self._adapter_writer = adapter_writer
        # a separate group: no collective of the engine ever waits for a disk
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._fingerprint = self._first(lambda: fingerprint(base))
        self._meshes = Meshes()
        self._host, self._copies = HostMemory(BLOCK_BYTES), list[HostCopy]()
        self._writer = ThreadPoolExecutor(1, "checkpoint", initializer=take_device) if asynchronous else None
        self._under_way: Future[None] | None = None

    def save(
        self,
        *,
        step: int,
        state: Mapping[str, Any],
        config: Mapping[str, Any],
        is_best: bool = False,
        wait: bool = False,
    ) -> Path:
        """Save masters, moments, random states and the given values (JSON); return the final folder.

        If a save fails on any rank, all ranks raise RuntimeError, and earlier checkpoints stay. For asynchronous
        checkpoints, the next call of `save`, `poll` or `wait` raises the error; with `wait=True`, even an
        asynchronous save is written before this returns.
        """
        self.wait()
        own_slices = slices(self.engine, self.empty)
        writer = None if wait else self._writer
        save = _Save(
            final=self.folder / f"step-{step:06d}",
            slices=own_slices if writer is None else self._copied(own_slices),
            random=_random_states(),
            manifest=self._manifest(step, own_slices, state, config),
            is_best=is_best,
        )
        if writer is None:
            self._write(save)
        else:
            self._under_way = writer.submit(self._write, save)
        return save.final

    def wait(self) -> None:
        """Wait until no save is being written, and raise the error of a save that failed."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def poll(self) -> None:
        """Raise the error of an asynchronous save that has failed, without waiting for a running one."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def _write(self, save: _Save) -> None:
        """Write one save and name it in LATEST; runs in the thread if asynchronous."""
        try:
            with ExitStack() as stack:
                partial = self._first(lambda: self._open(stack, save.final))
                require_whole(save.slices, self._group)
                files = self._all(lambda: self._write_own(save, partial))
                self._first(lambda: self._close(stack, partial, replace(save.manifest, files=files)))
            self._first(lambda: point_and_prune(save.final, self.keep, is_best=save.is_best))
        except OSError as error:
            last = find_latest(self.folder)
            raise RuntimeError(
                f"step {save.manifest.step}: the checkpoint was not saved: {error}. "
                + (f"The last good checkpoint is {last}" if last else "There is no checkpoint yet")
            ) from error

    def _write_own(self, save: _Save, partial: Path) -> dict[str, File]:
        prefix = write(flat_tensors(save.slices, self._meshes) | save.random, partial)
        return {path.name: checked(path) for path in partial.glob(f"{prefix}*")}

    def _close(self, stack: ExitStack, partial: Path, manifest: Manifest) -> None:
        """Write the adapter and then the manifest, which completes the checkpoint, and rename the folder."""
        assert {path.name for path in partial.glob("*.safetensors")} == set(manifest.files), "a rank's file is missing"
        if self._adapter_writer is not None:
            self._adapter_writer(partial, manifest)
        write_manifest(partial, manifest)
        stack.close()

    def _copied(self, own_slices: list[Slice]) -> list[Slice]:
        """Copy the slices to host memory, which is reused, since only one save is written at a time."""
        self._copies.clear()
        copied = []
        for slice_ in own_slices:
            copies = {kind: self._host.copy(view) for kind, view in slice_.views.items()}
            self._copies += copies.values()
            copied.append(replace(slice_, views={kind: copy.values for kind, copy in copies.items()}))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copied

    def restore(self, path: Path, *, config: Mapping[str, Any]) -> Resumed:
        """Restore a checkpoint saved under the same config, on any number of ranks and any ep.

        A checkpoint of another run or a damaged one raises ValueError before anything is changed.
        """
        self.wait()
        own_slices = slices(self.engine, self.empty)
        saved = self._first(lambda: self._resumable(path, own_slices, config))
        own_files = sorted(saved.files)[dist.get_rank() :: dist.get_world_size()]
        self._all(lambda: require_intact(path, saved.files, own_files))
        random = _random_states() if dist.get_rank() < saved.ranks else {}
        random = {name: state for name, state in random.items() if name.split("/")[1] in saved.random}
        try:
            self._all(lambda: self._read_own(own_slices, random, path))
        except OSError as error:
            raise RuntimeError(
                f"{path} could not be read: {error}. Resume from another checkpoint: checkpoint.resume=PATH"
            ) from error
        for slice_ in own_slices:
            slice_.steps.fill_(saved.trained[slice_.canonical].updates)
        put_in_service(self.engine)
        keep_whole(self.engine)
        _reseed(random)
        return Resumed(path=path, step=saved.step, ranks=saved.ranks, state=dict(saved.state), config=saved.config)

    def _read_own(self, own_slices: list[Slice], random: dict[str, Tensor], path: Path) -> dict[str, None]:
        try:
            read(flat_tensors(own_slices, self._meshes) | random, path)
        except CheckpointException as error:
            raise OSError("; ".join(str(cause) for cause, _ in error.failures.values())) from error
        return {}

    def _resumable(self, path: Path, own_slices: list[Slice], config: Mapping[str, Any]) -> Manifest:
        """Read a checkpoint's manifest; raise unless this run can continue from it."""
        saved = read_manifest(path)
        require_same_run(
            path,
            saved,
            config=config,
            base=self.base,
            fingerprint=self._fingerprint,
            shapes={slice_.canonical: slice_.shape for slice_ in own_slices},
        )
        return saved

    def _open(self, stack: ExitStack, final: Path) -> Path:
        make_room(final)
        return stack.enter_context(whole_folder(final))

    def _manifest(
        self, step: int, own_slices: list[Slice], state: Mapping[str, Any], config: Mapping[str, Any]
    ) -> Manifest:
        return Manifest(
            step=step,
            ranks=dist.get_world_size(),
            ep=max((slice_.ep or 1 for slice_ in own_slices), default=1),
            base=str(self.base.folder),
            base_fingerprint=self._fingerprint,
            trained={slice_.canonical: Trained(shape=slice_.shape, updates=slice_.updates) for slice_ in own_slices},
            random=tuple(name.split("/")[1] for name in _random_states()),
            files={},
            state=state,
            config=config,
            config_hash=config_hash(config),
        )

    def _first(self, do: Callable[[], T]) -> T:
        """Call `do` on rank 0 only, and return its result or raise its error on every rank."""
        outcome: list[Any] = [None, None]  # a result, an error
        if dist.get_rank() == 0:
            try:
                outcome[0] = self._worked(do)
            except (OSError, ValueError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def _worked(self, do: Callable[[], T]) -> T:
        self._busy(True)
        try:
            return do()
        finally:
            self._busy(False)

    def _all(self, do: Callable[[], dict[str, T]]) -> dict[str, T]:
        """Call `do` on every rank, and return all results together or raise the same errors on every rank."""
        own: tuple[dict[str, T], Exception | None]
        try:
            own = self._worked(do), None
        except (OSError, ValueError) as error:
            own = {}, error
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, own, group=self._group)
        errors = {rank: error for rank, (_, error) in enumerate(outcomes) if error is not None}
        for failure in errors.values():
            if isinstance(failure, ValueError):
                raise failure
        if errors:
            raise OSError(listed([f"rank {rank}: {error}" for rank, error in errors.items()], between="; "))
        return {name: value for results, _ in outcomes for name, value in results.items()}


def _random_states() -> dict[str, Tensor]:
    """This rank's random states, one for each kind of device in use."""
    rank = f"{dist.get_rank():05d}"
    states = {f"random/cpu/{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"random/cuda/{rank}"] = torch.cuda.get_rng_state()
    return states


def _reseed(states: Mapping[str, Tensor]) -> None:
    for name, state in states.items():
        (torch.set_rng_state if name.startswith("random/cpu/") else torch.cuda.set_rng_state)(state)
