"""The licences of a source's samples, from a few of their records. No torch."""

from collections import Counter
from collections.abc import Mapping

from data.shards.reader import SampleReader
from data.stream.corpus import Corpus
from data.stream.plan import Units

LOOKED_AT = 32
"""The most records of each source that are read: to read all would delay the start."""
NONE = "not stated"


def source_licences(corpus: Corpus, reader: SampleReader) -> dict[str, Mapping[str, int]]:
    """Return how often each licence occurs in a few records of each source, spread over its samples."""
    return {units.name: _licences(units, corpus, reader) for units in corpus.sources}


def _licences(units: Units, corpus: Corpus, reader: SampleReader) -> Mapping[str, int]:
    counts: Counter[str] = Counter()
    for at in range(0, len(units), max(1, -(-len(units) // LOOKED_AT))):
        try:
            record = reader.record(corpus.shards[units.shard[at]], int(units.sample[at]))
        except (ValueError, OSError):  # the step that reads this sample reports it
            continue
        counts[record.license or NONE] += 1
    return dict(counts.most_common())
