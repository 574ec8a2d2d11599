"""Tokens as text in which control tokens, spelled ones and supervised parts can be told apart."""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

_PADS = re.compile(r"((?:<\|(?:image|video)_pad\|>)+)")


def spelled_parts(
    ids: Iterable[Any], weights: Iterable[Any], tokenizer: Any, *, marks: Iterable[str] = ()
) -> Iterator[tuple[str, bool]]:
    """Yield the text of tokens in parts, each with whether it is supervised; runs of placeholders are counted.

    A control token, or one of the `marks`, that is only spelled in a text has a backslash before it.
    """
    added = tokenizer.added_tokens_decoder
    spelled = re.compile("|".join(map(re.escape, [*marks, *(token.content for token in added.values())])))
    for is_supervised, group in groupby(zip(ids, weights, strict=True), key=lambda pair: bool(pair[1] > 0)):
        pieces = []
        for is_control, tokens in groupby((int(token) for token, _ in group), key=added.__contains__):
            piece = tokenizer.decode(list(tokens), skip_special_tokens=False)
            pieces.append(piece if is_control else spelled.sub(r"\\\g<0>", piece))
        yield (
            _PADS.sub(lambda pads: f"{pads[0][: pads[0].index('>') + 1]}×{pads[0].count('>')}", "".join(pieces)),
            is_supervised,
        )
