"""Turns rendered text into token ids with loss weights and kinds, and repeats placeholders for their media."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.render.chat import Rendered
from data.render.positions import IMAGE, TEXT, VIDEO


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One sample's row, before its positions."""

    ids: np.ndarray[Any, np.dtype[np.int32]]
    weights: np.ndarray[Any, np.dtype[np.float32]]  # of a token as a label: predicted from those before it
    kinds: np.ndarray[Any, np.dtype[np.int8]]


def tokenise(rendered: Rendered, tokenizer: Any, *, image_pad: int, video_pad: int) -> Tokens:
    """Tokenise rendered text. A token gets the weight of its last character, so a border cuts off no supervision."""
    ids: list[int] = []
    ends: list[int] = []
    for piece_ids, piece_ends in _pieces(rendered, tokenizer):
        ids += piece_ids
        ends += piece_ends
    row = np.array(ids, dtype=np.int32)
    weights = rendered.weights[np.array(ends, dtype=np.int64) - 1]
    kinds = np.where(row == image_pad, IMAGE, np.where(row == video_pad, VIDEO, TEXT)).astype(np.int8)
    weights[:1] = 0  # nothing comes before the first token of a sample
    return Tokens(ids=row, weights=weights, kinds=kinds)


def widen(tokens: Tokens, *, images: Sequence[int], frame_pairs: Sequence[int]) -> Tokens:
    """Repeat every placeholder for each token of its image or frame pair."""
    times = np.ones(len(tokens.ids), dtype=np.int64)
    for kind, counts in ((IMAGE, images), (VIDEO, frame_pairs)):
        places = np.flatnonzero(tokens.kinds == kind)
        assert len(places) == len(counts), f"{len(places)} placeholders for {len(counts)} media"
        times[places] = counts
    return Tokens(
        ids=np.repeat(tokens.ids, times), weights=np.repeat(tokens.weights, times), kinds=np.repeat(tokens.kinds, times)
    )


def _pieces(rendered: Rendered, tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (ids, end of each token in the text); text that only spells a control token is read as ordinary text."""
    backend, at = tokenizer.backend_tokenizer, 0
    for start, end in (*rendered.plain, (len(rendered.text), len(rendered.text))):
        if start > at:
            encoded = backend.encode(rendered.text[at:start], add_special_tokens=False)
            yield encoded.ids, [at + stop for _, stop in encoded.offsets]
        if end > start:
            ids = _plain_ids(rendered.text[start:end], backend)
            yield ids, [end] * len(ids)
        at = end


def _plain_ids(text: str, backend: Any) -> list[int]:
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]
    return [token.id for word in words for token in backend.model.tokenize(word)]
