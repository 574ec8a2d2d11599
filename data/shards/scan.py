"""Builds an index in one pass over a tar, from records and the headers of media. Loads the decoders."""

from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from zlib import crc32

import numpy as np

from data.format.facts import ImageFacts, VideoFacts
from data.format.record import Record, RecordError
from data.format.tar import KeyedMembers, group_members, walk_tar
from data.render.frames import probe_video
from data.render.image import probe_image
from data.render.video import frame_list_facts
from data.shards.bytes import ByteReader, Places, VideoBytes, read_media
from data.shards.index import ShardIndex
from data.shards.layout import layout_of, media_of, parse_sample
from data.stores.cache import held

MediaFacts = tuple[list[ImageFacts], list[VideoFacts]]


def probe_media(record: Record, images: Sequence[bytes], videos: Sequence[VideoBytes]) -> MediaFacts:
    """Return the facts of a record's media; ValueError names the medium that cannot be used."""
    image_facts = [probe_image(data, name=f"images[{number}]") for number, data in enumerate(images)]
    video_facts = []
    for number, (video, data) in enumerate(zip(record.videos, videos, strict=True)):
        name = f"videos[{number}]"
        if isinstance(data, bytes):
            video_facts.append(probe_video(data, name=name))
        else:
            frames = [probe_image(frame, name=f"{name} frame {at}") for at, frame in enumerate(data)]
            try:
                video_facts.append(frame_list_facts(video, frames))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return image_facts, video_facts


def scan_shard(shard: Path, stamp: str, places: Places) -> ShardIndex:
    """Read the whole tar once. Unusable samples are listed with their reasons; a broken tar raises ShardError."""
    with held(shard):
        return _scan(shard, stamp, places)


def _scan(shard: Path, stamp: str, places: Places) -> ShardIndex:
    reader = ByteReader(places)
    samples = list(group_members(shard, walk_tar(shard)))
    layout = layout_of(shard, samples, reader)
    crcs: list[int] = []
    facts: list[MediaFacts] = []
    problems: dict[int, str] = {}
    for number, sample in enumerate(samples):
        if sample.too_large:
            problems[number] = sample.too_large
            facts.append(([], []))
            crcs += [0] * len(sample.names)
            continue
        members = {
            name: reader.read(shard, offset, size)
            for name, offset, size in zip(sample.names, sample.offsets, sample.sizes, strict=True)
        }
        crcs += [crc32(data) for data in members.values()]
        try:
            facts.append(_scan_sample(reader, shard, sample, members, layout))
        except RecordError as error:
            problems[number] = error.reason
            facts.append(([], []))
    reader.close()
    return _index_of(samples, crcs, facts, problems, stamp, places.name if reader.outside else "", layout)


def _scan_sample(
    reader: ByteReader, shard: Path, sample: KeyedMembers, members: dict[str, bytes], layout: str
) -> MediaFacts:
    try:
        record = parse_sample(layout, sample.names, members.__getitem__, shard=shard.name, key=sample.key)
        if not record.supervised:
            raise ValueError("nothing supervised: no message carries loss")
        return probe_media(record, *read_media(record, media_of(layout, record, members), shard.parent, reader))
    except RecordError:
        raise
    except ValueError as error:
        raise RecordError(shard=shard.name, key=sample.key, reason=str(error)) from error


def _starts(counts: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array([0, *accumulate(counts)], dtype=np.int64)


def _index_of(
    samples: list[KeyedMembers],
    crcs: list[int],
    facts: list[MediaFacts],
    problems: dict[int, str],
    stamp: str,
    places: str,
    layout: str,
) -> ShardIndex:
    names = tuple(name for sample in samples for name in sample.names)
    sizes = [size for sample in samples for size in sample.sizes]
    images = [image for of_sample, _ in facts for image in of_sample]
    videos = [video for _, of_sample in facts for video in of_sample]
    digest = blake2b(digest_size=16)
    digest.update(repr(([sample.key for sample in samples], names, sizes, crcs, facts)).encode())
    digest.update(layout.encode())  # of our own layout nothing, as before there were others
    return ShardIndex(
        stamp=stamp,
        places=places,
        layout=layout,
        digest=digest.hexdigest(),
        keys=tuple(sample.key for sample in samples),
        names=names,
        problems=problems,
        member_starts=_starts([len(sample.names) for sample in samples]),
        offsets=np.array([offset for sample in samples for offset in sample.offsets], dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int64),
        crcs=np.array(crcs, dtype=np.uint32),
        image_starts=_starts([len(of_sample) for of_sample, _ in facts]),
        image_sizes=np.array([(i.height, i.width) for i in images], dtype=np.int32).reshape(-1, 2),
        video_starts=_starts([len(of_sample) for _, of_sample in facts]),
        video_table=np.array(
            [(v.height, v.width, v.frames, v.duration, v.rate) for v in videos], dtype=np.float64
        ).reshape(-1, 5),
        time_starts=_starts([len(v.times or ()) for v in videos]),
        times=np.array([time for v in videos for time in v.times or ()], dtype=np.float64),
    )
