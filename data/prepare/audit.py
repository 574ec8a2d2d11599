"""Finds everything that is wrong with shards, for `moetune shards check`. Loads the decoders."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data.format.facts import ImageFacts, VideoFacts
from data.format.record import RecordError
from data.format.tar import ShardError
from data.render.frames import open_video
from data.render.image import decode_image
from data.render.sample import Renderer
from data.render.vision import MAX_ASPECT
from data.shards.bytes import Places
from data.shards.index import ShardIndex, stamp_of
from data.shards.reader import SampleReader, store_index
from data.shards.scan import scan_shard

_KEY = re.compile(r"[a-z0-9_/-]+")
_DETAIL = re.compile(r"'[^']*'|\"[^\"]*\"|[\[(][^\[\]()]*[\])]|\S*/\S*|\S*\d\S*")
"""Details in which two reasons of one kind differ: quoted text, lists, paths, numbers."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A fault of a shard, or of one sample in it; a warning if training accepts it."""

    shard: str
    key: str  # empty: the shard as a whole
    reason: str
    level: Literal["error", "warning"] = "error"

    @property
    def kind(self) -> tuple[str, str]:
        """The level and the reason without details: equal for findings that differ only in names and numbers."""
        return self.level, _DETAIL.sub("...", self.reason)

    def __str__(self) -> str:
        return (
            f"shard {self.shard}, sample {self.key}: {self.reason}"
            if self.key
            else f"shard {self.shard}: {self.reason}"
        )


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """Depth of the check. With a renderer every sample is rendered as in training."""

    renderer: Renderer | None = None
    tokens_per_pack: int | None = None  # longer samples are reported; needs the renderer
    decode: bool = True  # pixels too, not only headers
    cache_dir: Path | None = None
    places: Places = field(default_factory=Places)


def by_kind(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Group findings of one kind, errors before warnings."""
    kinds: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(finding)
    return sorted(kinds.values(), key=lambda group: group[0].level)


def audit_shards(
    shards: Sequence[Path], options: AuditOptions, progress: Callable[[int, int], object] = lambda *_: None
) -> Iterator[Finding]:
    """Yield everything wrong with these shards, in order. `progress` gets the shards and samples done."""
    seen: dict[str, str] = {}
    samples = 0
    for done, shard in enumerate(shards):
        try:
            index = scan_shard(shard, stamp_of(shard), options.places)
        except ShardError as error:
            yield Finding(shard=str(shard), key="", reason=error.reason)
            progress(done + 1, samples)
            continue
        with suppress(ShardError):  # a folder that cannot be written is nothing of its shards
            store_index(index, shard, cache_dir=options.cache_dir, places=options.places)
        if not len(index):
            yield Finding(shard=str(shard), key="", reason="contains no sample")
        for key in index.keys:
            if key in seen:
                reason = f"the key is used in {seen[key]} too: training tells such samples apart, other tools may not"
                yield Finding(shard=str(shard), key=key, reason=reason, level="warning")
            seen[key] = str(shard)
        for number, findings in enumerate(_audit_samples(shard, index, options), 1):
            yield from findings
            progress(done, samples + number)
        samples += len(index)
        progress(done + 1, samples)


def _audit_samples(shard: Path, index: ShardIndex, options: AuditOptions) -> Iterator[list[Finding]]:
    """Yield the findings of each sample."""
    reader = SampleReader(cache_dir=options.cache_dir, places=options.places)
    reader.keep(shard, index)
    for number, key in enumerate(index.keys):
        warnings = [*_key_warnings(key)]
        reasons = []
        if number in index.problems:
            reasons.append(index.problems[number])
        else:
            warnings += _single_frames(index.videos(number))
            reasons += _fact_reasons(index.images(number), index.videos(number))
            reasons += _deep_reasons(shard, number, reader, options)
        yield [
            *(Finding(shard=str(shard), key=key, reason=reason, level="warning") for reason in warnings),
            *(Finding(shard=str(shard), key=key, reason=reason) for reason in reasons),
        ]
    reader.bytes.close()


def _key_warnings(key: str) -> Iterator[str]:
    if not _KEY.fullmatch(key):
        yield "the key does not match [a-z0-9_/-]+: training takes it, other tools may cut or change it"


def _single_frames(videos: Sequence[VideoFacts]) -> Iterator[str]:
    for at, clip in enumerate(videos):
        if clip.frames == 1:
            yield f"videos[{at}] has a single frame: make it an image, or rely on data.video.single_frame=double"


def _fact_reasons(images: Sequence[ImageFacts], videos: Sequence[VideoFacts]) -> Iterator[str]:
    sizes = [(f"images[{at}]", image.height, image.width) for at, image in enumerate(images)]
    sizes += [(f"videos[{at}]", video.height, video.width) for at, video in enumerate(videos)]
    for name, height, width in sizes:
        if max(height, width) > MAX_ASPECT * min(height, width):
            yield f"{name} is {width}x{height}: sides differ by more than a factor of {MAX_ASPECT}"


def _deep_reasons(shard: Path, number: int, reader: SampleReader, options: AuditOptions) -> Iterator[str]:
    """Yield what shows only when the sample is decoded, or rendered where there is a renderer."""
    try:
        record, members = reader.sample(shard, number)
        if not options.decode and options.renderer is None:
            return
        images, videos = reader.media(record, members, shard.parent)
        if options.renderer is None:
            for at, data in enumerate(images):
                decode_image(data, name=f"images[{at}]")
            for at, clip in enumerate(videos):
                _decode_video(clip, f"videos[{at}]", reader.index(shard).videos(number)[at])
            return
        sample = options.renderer.build(record, images, videos, key=reader.index(shard).keys[number])
    except RecordError as error:
        yield error.reason
    except ValueError as error:
        yield str(error)
    else:
        if not sample.loss_weights.any():
            yield "nothing supervised: no token carries loss once rendered"
        if options.tokens_per_pack is not None and len(sample.input_ids) > options.tokens_per_pack:
            yield f"has {len(sample.input_ids)} tokens, more than the {options.tokens_per_pack} of a pack"


def _decode_video(clip: bytes | list[bytes], name: str, facts: VideoFacts) -> None:
    if isinstance(clip, list):
        for at, frame in enumerate(clip):
            decode_image(frame, name=f"{name} frame {at}")
        return
    with open_video(clip, name=name, timeout=600.0) as film:
        for _ in film.frames(range(facts.frames)):
            pass
