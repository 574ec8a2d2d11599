"""Reads records and media from shards, from files that samples share and from the web. No torch."""

from collections import OrderedDict
from collections.abc import Callable, Collection
from pathlib import Path
from zlib import crc32

from data.format.record import Record, RecordError
from data.format.tar import ShardError
from data.shards.bytes import ByteReader, Places, VideoBytes, read_media
from data.shards.index import ShardIndex, read_index, save_index, stamp_of
from data.shards.layout import declared_layout, media_of, parse_sample
from data.shards.sidecar import sidecar
from data.stores.cache import alone, is_there
from data.stores.remote import remote_of
from data.stores.transfer import require_unchanged

_OPEN_INDEXES = 256


class SampleReader:
    """Reads samples of any shard by number, and checks them against the index's checksums."""

    def __init__(self, *, cache_dir: Path | None = None, places: Places | None = None) -> None:
        self.bytes = ByteReader(places)
        self._cache_dir = cache_dir
        self._indexes: OrderedDict[Path, ShardIndex] = OrderedDict()

    def index(self, shard: Path) -> ShardIndex:
        """Return the shard's index, from memory if it was used lately."""
        if shard in self._indexes:
            self._indexes.move_to_end(shard)
        else:
            self._indexes[shard] = load_index(shard, cache_dir=self._cache_dir, places=self.bytes.places)
            if len(self._indexes) > _OPEN_INDEXES:
                self._indexes.popitem(last=False)
        return self._indexes[shard]

    def keep(self, shard: Path, index: ShardIndex) -> None:
        """Use this index for a shard, in place of a stored one."""
        self._indexes[shard] = index

    def members(self, shard: Path, number: int) -> dict[str, bytes]:
        """Return the bytes of every member of a sample, by one read; RecordError if they changed since indexing."""
        index = self.index(shard)
        rows = range(*index.member_rows(number))
        first, last = rows[0], rows[-1]
        start = int(index.offsets[first])
        try:
            blob = self.bytes.read(shard, start, int(index.offsets[last] + index.sizes[last]) - start)
        except ValueError as error:
            raise RecordError(shard=shard.name, key=index.keys[number], reason=str(error)) from error
        members = {}
        for row in rows:
            at = int(index.offsets[row]) - start
            members[index.names[row]] = data = blob[at : at + int(index.sizes[row])]
            if crc32(data) != index.crcs[row]:
                if (remote := remote_of(shard)) is not None:
                    require_unchanged(remote)
                reason = f"{index.names[row]} changed since it was indexed; run: moetune shards index --force {shard}"
                raise RecordError(shard=shard.name, key=index.keys[number], reason=reason)
        return members

    def sample(self, shard: Path, number: int) -> tuple[Record, dict[str, bytes]]:
        """Return the parsed record and the bytes of the members that its media are."""
        members = self.members(shard, number)
        record = self._parse(shard, number, members, members.__getitem__)
        return record, media_of(self.index(shard).layout, record, members)

    def record(self, shard: Path, number: int) -> Record:
        """Return the parsed record alone; media are not read."""
        index = self.index(shard)
        rows = {index.names[row]: row for row in range(*index.member_rows(number))}

        def read(name: str) -> bytes:
            return self.bytes.read(shard, int(index.offsets[rows[name]]), int(index.sizes[rows[name]]))

        return self._parse(shard, number, rows, read)

    def _parse(self, shard: Path, number: int, names: Collection[str], read: Callable[[str], bytes]) -> Record:
        index = self.index(shard)
        return parse_sample(index.layout, list(names), read, shard=shard.name, key=index.keys[number])

    def media(self, record: Record, members: dict[str, bytes], folder: Path) -> tuple[list[bytes], list[VideoBytes]]:
        """Return the bytes of images and videos in order, as `read_media` does."""
        return read_media(record, members, folder, self.bytes)


def load_index(
    shard: Path, *, cache_dir: Path | None = None, force: bool = False, places: Places | None = None
) -> ShardIndex:
    """Load the stored index if it is up to date, else build and store it; ShardError if the tar is not complete."""
    if not is_there(shard):
        raise ShardError(shard, "does not exist or is not a file")
    stamp = stamp_of(shard)
    places = places or Places()
    with alone(shard):
        suffix = places.beside(shard, ".idx")
        stored = [sidecar(shard, suffix, None)] + ([sidecar(shard, suffix, cache_dir)] if cache_dir else [])
        declared = declared_layout(shard, places)
        if not force:
            for path in stored:
                if (index := read_index(path, stamp, places.name, declared)) is not None:
                    return index
        from data.shards.scan import scan_shard  # the decoders are loaded only where an index has to be built

        index = scan_shard(shard, stamp, places)
        store_index(index, shard, cache_dir=cache_dir, places=places)
    return index


def store_index(index: ShardIndex, shard: Path, *, cache_dir: Path | None, places: Places) -> None:
    """Store an index beside its shard or in the cache folder, and remove lengths that an earlier index had."""
    save_index(index, sidecar(shard, places.beside(shard, ".idx"), cache_dir))
    sidecar(shard, places.beside(shard, ".len"), cache_dir).unlink(missing_ok=True)
