"""Steps for one rank: reads the packs of the plan, in this process or in workers; its state is a few bytes.

Ranks are plain integers. The packs of a global step do not depend on the number of ranks or workers.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from data.format.printable import count_of
from data.render.sample import Renderer
from data.stores.ahead import ReadAhead, reading_ahead
from data.stores.cache import CacheCounts
from data.stores.remote import StoreError, remote_of
from data.stream.batch import BadSample, LossSums, Step
from data.stream.being_read import Reading
from data.stream.corpus import Corpus
from data.stream.pack_reader import PackReader, PackResult, Unit
from data.stream.plan import Plan, PlanSettings, make_plan, steps_of_epochs

STATE_VERSION = 1
SPARSE = 8
"""A remote shard is read by ranges where an epoch uses less than one sample in so many."""
LOOK_S = 1.0
"""While waiting for a pack, check this often (seconds) whether the wait has been cancelled."""


class TooManyBadSamples(ValueError):
    """More samples failed than allowed."""


class WaitIsOver(Exception):
    """The wait for a pack was cancelled. The traceback keeps the workers alive until it is released."""


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """Settings of one rank's reading. None of them changes the content of a step."""

    workers: int = 0
    prefetch: int = 2  # packs that each worker keeps ready
    pad_multiple: int = 1  # rows are padded to a multiple of this, for the slices of sequence parallelism
    max_bad_samples: int = 100
    stall_seconds: float = 0.0  # longest wait for one pack (with workers); 0 means no limit
    cache_dir: Path | None = None


class _Order(Sampler[tuple[Unit, ...]]):
    """The packs of the rest of an epoch, in this rank's order."""

    def __init__(self, packs: Iterator[tuple[Unit, ...]]) -> None:
        self._packs = packs

    def __iter__(self) -> Iterator[tuple[Unit, ...]]:
        return self._packs


def _same(result: Any) -> Any:
    return result


class DataStream:
    """The steps of one rank. Every rank creates its own from the same corpus and settings, without communication."""

    def __init__(
        self,
        corpus: Corpus,
        renderer: Renderer,
        plan_settings: PlanSettings,
        settings: StreamSettings,
        *,
        data_rank: int,
        data_size: int,
    ) -> None:
        assert 0 <= data_rank < data_size, f"data_rank {data_rank} of {data_size}"
        self._corpus, self._renderer = corpus, renderer
        self._plan_settings, self._settings = plan_settings, settings
        self._rank, self._size = data_rank, data_size
        self._bases = np.concatenate([[0], np.cumsum([len(units) for units in corpus.sources])])
        self._quarantine: dict[int, tuple[int, BadSample]] = {}  # unit -> (epoch in which it failed, report)
        self.epoch, self.step = 0, 0
        self._plan: Plan | None = None
        self._reading = Reading(settings.workers)
        self.is_over: Callable[[], bool] = lambda: False
        """Called while waiting for workers: True makes the wait raise WaitIsOver."""

    @property
    def plan(self) -> Plan:
        """The plan of the current epoch."""
        if self._plan is None or self._plan.epoch != self.epoch:
            out = [unit for unit, (epoch, _) in self._quarantine.items() if epoch < self.epoch]
            self._plan = self._make_plan(self.epoch, sorted(out))
        return self._plan

    def _make_plan(self, epoch: int, out: Sequence[int] = ()) -> Plan:
        units = np.array(out, dtype=np.int64)
        return make_plan(self._corpus.sources, self._plan_settings, epoch=epoch, quarantine=units)

    def steps_of(self, epochs: float) -> int:
        """Return the steps of this many epochs, counted from the first; samples left out later do not change it."""
        return steps_of_epochs(self._make_plan, epochs)

    def __iter__(self) -> Iterator[Step]:
        """Yield the steps from the current position to the end of the epoch."""
        plan = self.plan
        steps = range(self.step, plan.steps)
        packs = (pack for step in steps for pack in plan.share(step, self._rank, self._size))
        results = iter(self._loader(packs))  # its workers are forked before there are threads
        with reading_ahead(self._shards_by_step(steps)) as ahead:
            yield from self._steps(results, steps, plan, ahead)

    def _steps(
        self, results: Iterator[PackResult], steps: range, plan: Plan, ahead: ReadAhead | None
    ) -> Iterator[Step]:
        for number in steps:
            if ahead is not None:
                ahead.at(number)
            began = time.perf_counter()
            slots = -(-len(plan.step_packs(number)) // self._size)
            read = [self._take(results, number) for _ in range(slots)]
            self.step = number + 1  # before the yield: a checkpoint written after this step records it as done
            yield Step(
                epoch=plan.epoch,
                step=number,
                batches=tuple(result.batch for result in read),
                sums=sum((result.sums for result in read), LossSums()),
                bad=tuple(bad for result in read for bad in result.bad),
                notes=tuple(note for result in read for note in result.notes),
                tokens=sum(result.tokens for result in read),
                images=sum(len(result.batch.image_grids) for result in read),
                video_seconds=sum(result.video_seconds for result in read),
                wait_seconds=time.perf_counter() - began,
                reads=sum((result.reads for result in read), CacheCounts(bytes=ahead.take_bytes() if ahead else 0)),
            )

    def _loader(self, packs: Iterator[int | None]) -> DataLoader[PackResult]:
        workers = self._settings.workers
        return DataLoader(
            PackReader(
                self._renderer,
                pad_multiple=self._settings.pad_multiple,
                cache_dir=self._settings.cache_dir,
                places=self._corpus.places,
                reading=self._reading,
                sparse=self._sparse(),
            ),
            batch_size=None,
            sampler=_Order(self._units(pack) for pack in packs),
            num_workers=workers,
            prefetch_factor=self._settings.prefetch if workers else None,
            collate_fn=_same,
            # the loader draws a seed for its workers; that must not change dropout's generator, which resumes restore
            generator=torch.Generator().manual_seed(self._plan_settings.seed),
            timeout=min(LOOK_S, self._settings.stall_seconds or LOOK_S) if workers else 0,
        )

    def _shards_by_step(self, steps: range) -> Iterator[tuple[int, Path]]:
        """Yield the shards that this rank reads in these steps."""
        if not any(map(remote_of, self._corpus.shards)):
            return
        sparse, table = self._sparse(), self._corpus.shards
        shards = np.concatenate([units.shard for units in self._corpus.sources])
        for step in steps:
            packs = [pack for pack in self.plan.share(step, self._rank, self._size) if pack is not None]
            numbers = {number for pack in packs for number in shards[self.plan.units(pack)].tolist()}
            yield from ((step, table[number]) for number in sorted(numbers) if table[number] not in sparse)

    def _sparse(self) -> frozenset[Path]:
        """Return the shards of stores of which this epoch reads only a few samples, which are read by ranges."""
        shards, table = np.concatenate([units.shard for units in self._corpus.sources]), self._corpus.shards
        used = np.bincount(shards[self.plan.packs.members], minlength=len(table))
        few = np.flatnonzero((used > 0) & (used * SPARSE < np.bincount(shards, minlength=len(table))))
        return frozenset(table[number] for number in few.tolist() if remote_of(table[number]) is not None)

    def _units(self, pack: int | None) -> tuple[Unit, ...]:
        return () if pack is None else tuple(self._unit(number) for number in self.plan.units(pack))

    def _unit(self, number: int) -> Unit:
        source = int(np.searchsorted(self._bases, number, side="right")) - 1
        units, row = self._corpus.sources[source], number - int(self._bases[source])
        shard = self._corpus.shards[int(units.shard[row])]
        return Unit(number, units.name, shard, int(units.sample[row]), int(units.part[row]), int(units.tokens[row]))

    def _take(self, results: Iterator[PackResult], step: int) -> PackResult:
        began, limit = time.monotonic(), self._settings.stall_seconds
        while True:
            try:
                return next(results)
            except StoreError as error:  # from a worker, with its traceback before the message
                raise StoreError(str(error).rpartition("StoreError: ")[2].strip()) from error
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                if self.is_over():
                    raise WaitIsOver(f"step {step}") from error
                if limit and time.monotonic() - began >= limit:
                    raise self._stalled(step) from error

    def _stalled(self, step: int) -> TimeoutError:
        return TimeoutError(
            f"data stall on data rank {self._rank}: no pack for step {step} of epoch {self.epoch} within "
            f"data.stall_seconds={self._settings.stall_seconds:g}. Its samples are in "
            f"{', '.join(sorted(self._shards_of(step)))}; being read: {'; '.join(self._reading.now()) or 'none'}"
        )

    def reading(self) -> list[str]:
        """Return the samples that this process and its workers are reading; safe to call from another thread.

        If there are none, return the shards of the next samples.
        """
        return self._reading.now() or [f"none yet of {', '.join(sorted(self._shards_of(self.step)))}"]

    def _shards_of(self, step: int) -> set[str]:
        packs = self.plan.share(step, self._rank, self._size) if step < self.plan.steps else []
        return {str(unit.shard) for pack in packs for unit in self._units(pack)}

    def quarantine(self, bad: Sequence[BadSample]) -> None:
        """Leave these samples out from the next epoch on. Every rank must pass the same list: the reports of all ranks.

        Raise TooManyBadSamples, on every rank, when there are more than data.max_bad_samples.
        """
        for item in bad:
            self._quarantine.setdefault(item.unit, (self.epoch, item))
        if len(self._quarantine) > self._settings.max_bad_samples:
            shown = "; ".join(str(item) for _, item in list(self._quarantine.values())[:5])
            raise TooManyBadSamples(
                f"{count_of(len(self._quarantine), 'sample')} could not be read, but data.max_bad_samples is "
                f"{self._settings.max_bad_samples}: {shown}; ... Run: moetune shards check"
            )

    def next_epoch(self) -> None:
        """Move to the start of the next epoch, which leaves out quarantined samples."""
        self.epoch, self.step = self.epoch + 1, 0

    def _identity(self) -> dict[str, str]:
        settings = {**asdict(self._plan_settings)}
        seed = settings.pop("seed")
        if not settings["budgets"]:  # as before there were any, so that earlier checkpoints go on
            del settings["budgets"]
        return {
            "data": self._corpus.digest,
            "rendering (tokenizer, template, limits)": self._renderer.fingerprint,
            "packing and mixture": blake2b(repr(sorted(settings.items())).encode(), digest_size=8).hexdigest(),
            "run.seed": str(seed),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream. It is the same on every rank, for any number of ranks or workers."""
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "step": self.step,
            "identity": self._identity(),
            "quarantine": [[epoch, asdict(bad)] for _, (epoch, bad) in sorted(self._quarantine.items())],
        }

    def load_state_dict(self, state: dict[str, Any], *, changed: bool = False) -> list[str]:
        """Continue from a saved position. Refuse a changed corpus or plan; with `changed`, return its differences."""
        if state["version"] != STATE_VERSION:
            raise ValueError(f"the data state has version {state['version']}; this moetune reads {STATE_VERSION}")
        identity = self._identity()
        differs = [name for name, value in identity.items() if state["identity"].get(name) != value]
        if differs and not changed:
            raise ValueError(
                f"the data of this run is not that of the checkpoint: {', '.join(differs)} changed. Samples would "
                "repeat or be missed. Restore them, or allow the change and continue at the same step in a new order"
            )
        self.epoch, self.step = state["epoch"], state["step"]
        known = not differs  # unit numbers mean nothing in another corpus, where bad samples are found again
        entries = map(itemgetter(0, 1), state["quarantine"] if known else [])
        self._quarantine = {item["unit"]: (epoch, BadSample(**item)) for epoch, item in entries}
        self._plan = None
        return differs
