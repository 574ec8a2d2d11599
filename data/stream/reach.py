"""The largest position in a corpus, which decides whether its context needs stretching; token counts do not.

An image of rows x columns tokens moves the positions on by its longer side only, so a video of a million tokens may
stay below a hundred thousand positions. A sample never reaches a position beyond its number of tokens: samples are
looked at from the longest down, and only until no later one can reach further. No pixels, no tokenizer.
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
    """The largest position plus one; when not `exact`, no sample comes near enough for its own to matter."""

    positions: int
    exact: bool
    sample: str = ""


def reach(corpus: Corpus, renderer: Renderer, *, enough: int, cache_dir: Path | None = None) -> Reach:
    """Find it; where every sample has at most `enough` tokens, its longest length is answer enough."""
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
