"""Reads the units of a pack into a batch, in a worker. Samples that fail are left out and reported."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from data.format.facts import VideoFacts
from data.format.media import VideoRef
from data.format.record import RecordError
from data.format.tar import ShardError
from data.format.turns import cut_record
from data.render.sample import Renderer, Sample
from data.shards.bytes import Places
from data.shards.reader import SampleReader
from data.stores.cache import CacheCounts
from data.stream.batch import BadSample, Batch, LossSums, collate, loss_sums
from data.stream.being_read import Reading
from data.stream.corpus import decode_part


@dataclass(frozen=True)
class Unit:
    """One unit of a plan: a sample or a part of one, and its shard."""

    number: int  # among all units of the corpus
    source: str
    shard: Path
    sample: int
    part: int
    tokens: int


@dataclass(frozen=True)
class PackResult:
    """The batch of a pack, and the facts about it that a step reports."""

    batch: Batch
    sums: LossSums
    bad: tuple[BadSample, ...]
    notes: tuple[str, ...]
    tokens: int
    video_seconds: float
    reads: CacheCounts


class PackReader(Dataset[PackResult]):
    """A data set of packs for the workers of a DataLoader."""

    def __init__(
        self,
        renderer: Renderer,
        *,
        pad_multiple: int,
        cache_dir: Path | None,
        places: Places,
        reading: Reading | None = None,
        sparse: Collection[Path] = (),
    ) -> None:
        self._renderer, self._multiple = renderer, pad_multiple
        self._cache_dir, self._places = cache_dir, places
        self._reading, self._sparse = reading or Reading(0), sparse
        self._reader: SampleReader | None = None

    def __getitem__(self, units: tuple[Unit, ...]) -> PackResult:
        samples: list[Sample] = []
        keys: list[str] = []
        notes: list[str] = []
        bad: list[BadSample] = []
        video_seconds = 0.0
        for unit in units:
            try:
                key, sample, seconds = self._build(unit)
            except RecordError as error:
                bad.append(_bad(unit, error.key, error.reason))
                continue
            samples.append(sample)
            video_seconds += seconds
            keys.append(f"{unit.source}/{unit.shard.name}/{key}")
            notes += [f"{keys[-1]}: {note}" for note in sample.notes]
        self._reading.note("")
        batch = collate(
            samples,
            keys=keys,
            pad_id=self._renderer.pad_id,
            multiple=self._multiple,
            widths=self._renderer.patch_widths,
        )
        tokens = sum(len(sample.input_ids) for sample in samples)
        return PackResult(batch, loss_sums(batch), tuple(bad), tuple(notes), tokens, video_seconds, self._taken())

    def _taken(self) -> CacheCounts:
        """Return what the cache did since the last pack."""
        if self._reader is None:
            return CacheCounts()
        taken, self._reader.bytes.counts = self._reader.bytes.counts, CacheCounts()
        return taken

    def _build(self, unit: Unit) -> tuple[str, Sample, float]:
        """Return the key, the sample, and its seconds of video."""
        if self._reader is None:  # created here, so that no open file is passed to a worker
            self._reader = SampleReader(cache_dir=self._cache_dir, places=self._places)
            self._reader.bytes.sparse = self._sparse
        self._reading.note(f"{unit.source}/{unit.shard.name}/number {unit.sample}")
        try:
            record, members = self._reader.sample(unit.shard, unit.sample)
        except ShardError as error:  # removed or truncated since the start: reported to every rank, so none fails alone
            raise RecordError(shard=unit.shard.name, key=f"number {unit.sample}", reason=error.reason) from error
        index = self._reader.index(unit.shard)
        key, video_facts = index.keys[unit.sample], index.videos(unit.sample)
        self._reading.note(f"{unit.source}/{unit.shard.name}/{key}")
        try:
            images, videos = self._reader.media(record, members, unit.shard.parent)
            if part := decode_part(unit.part):
                cut = cut_record(record, *part)
                record = cut.record
                images, videos = cut.of(images, videos)
                _, video_facts = cut.of(index.images(unit.sample), video_facts)
            sample = self._renderer.build(record, images, videos, key=key, shard=unit.shard.name)
        except ValueError as error:
            raise RecordError(shard=unit.shard.name, key=key, reason=str(error)) from error
        if len(sample.input_ids) != unit.tokens:
            reason = f"has {len(sample.input_ids)} tokens, but {unit.tokens} were planned; did a file change?"
            raise RecordError(shard=unit.shard.name, key=key, reason=reason)
        return key, sample, sum(map(_seconds, record.videos, video_facts))


def _seconds(video: VideoRef, facts: VideoFacts) -> float:
    """Return the length of the part of a video that a record selects."""
    end = facts.duration if video.end is None else min(video.end, facts.duration)
    return max(0.0, end - (video.start or 0.0))


def _bad(unit: Unit, key: str, reason: str) -> BadSample:
    return BadSample(unit=unit.number, source=unit.source, shard=unit.shard.name, key=key, reason=reason)
