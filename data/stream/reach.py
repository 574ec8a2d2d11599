"""The largest position in a corpus. It decides whether the context must be stretched; token counts do not.

An image of rows x columns tokens advances the positions by its longer side only, so a video of a million tokens may
stay below a hundred thousand positions. A sample's positions never exceed its number of tokens. So samples are checked
from the longest down, until none of the rest can reach further. This needs neither pixels nor a tokenizer.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.format.turns import cut_record
from data.render.sample import Renderer
from data.shards.reader import SampleReader
from data.stream.corpus import Corpus, decode_part


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The largest position plus one. When not `exact`, it is an upper bound that is already within the limit."""

    positions: int
    exact: bool
    sample: str = ""


def reach(corpus: Corpus, renderer: Renderer, *, enough: int, cache_dir: Path | None = None) -> Reach:
    """Return the reach of a corpus. If no sample has more than `enough` tokens, the longest length is returned."""
    tokens = np.concatenate([units.tokens for units in corpus.sources])
    if tokens.max() <= enough:
        return Reach(positions=int(tokens.max()), exact=False)
    farthest = Reach(positions=0, exact=True)
    reader = SampleReader(cache_dir=cache_dir, places=corpus.places)
    places = [(source, row) for source, units in enumerate(corpus.sources) for row in range(len(units))]
    for at in np.argsort(-tokens, kind="stable").tolist():
        if tokens[at] <= farthest.positions:
            break
        source, row = places[at]
        units = corpus.sources[source]
        shard, sample = corpus.shards[int(units.shard[row])], int(units.sample[row])
        index, record = reader.index(shard), reader.record(shard, sample)
        images, videos = index.images(sample), index.videos(sample)
        if part := decode_part(int(units.part[row])):
            cut = cut_record(record, *part)
            record = cut.record
            images, videos = cut.of(images, videos)
        text = int(tokens[at]) - renderer.count_vision(record, images, videos).tokens
        positions = text + renderer.vision_positions(record, images, videos)
        if positions > farthest.positions:
            name = f"source {units.name}, shard {shard.name}, sample {index.keys[sample]}"
            farthest = Reach(positions=positions, exact=True, sample=name)
    reader.bytes.close()
    return farthest
