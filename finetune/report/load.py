"""The load of the experts by layer, time, kind and source of the tokens, as bytes for the page's heatmap."""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from finetune.report.curves import buckets_of
from finetune.report.files import Record, RunFiles

EVEN = 32
"""The byte of an expert with an even share; 255 is eight times as much, or more. Only an expert without tokens is 0."""
FRAMES = 60
"""The most moments of the slider."""
DIVISIONS = ("kinds", "sources")

Counts = np.ndarray[Any, np.dtype[np.int64]]


def load(files: RunFiles, *, most_bytes: int) -> dict[str, Any] | None:
    """Return the heatmap's frames in at most about `most_bytes`; None if no load is recorded.

    A frame adds up the counts of successive records, so that each record is in one.
    """
    loads = _known(files)
    if not loads:
        return None
    views = [("all", "all tokens"), *_groups(loads)]
    shape = np.shape(loads[-1]["counts"])
    frames = max(1, min(FRAMES, len(loads), most_bytes // max(1, 4 * shape[0] * shape[1] // 3 * len(views))))
    buckets = buckets_of(len(loads), frames)
    counts_VFLE = np.zeros((len(views), len(buckets.starts), *shape), dtype=np.int64)
    for number, record in enumerate(loads):
        for view, (division, name) in enumerate(views):
            counts = _table(record.get("counts") if division == "all" else _group(record, division, name))
            if counts is not None and counts.shape == shape:
                counts_VFLE[view, number // buckets.width] += counts
    parts = [loads[start : start + buckets.width] for start in buckets.starts]
    layers = loads[-1].get("layers")
    totals_VLE = counts_VFLE.sum(1)
    return {
        "layers": layers if isinstance(layers, list) and len(layers) == shape[0] else list(range(shape[0])),
        "experts": shape[1],
        "frames": [[int(part[0]["step"]), int(part[-1]["step"]), len(part)] for part in parts],
        "views": [
            {
                "division": division,
                "name": name,
                "data": [_encoded(counts_LE) for counts_LE in counts_VFLE[view]],
                **_statistics(totals_VLE[view], totals_VLE[0]),
            }
            for view, (division, name) in enumerate(views)
        ],
    }


def total_counts(files: RunFiles) -> Counts | None:
    """Return the counts of all records added up, layers by experts; None if no load is recorded."""
    loads = _known(files)
    if not loads:
        return None
    counts = np.zeros(np.shape(loads[-1]["counts"]), dtype=np.int64)
    for record in loads:
        counts += np.array(record["counts"], dtype=np.int64)
    return counts


def _known(files: RunFiles) -> list[Record]:
    """Return the records with counts of the same shape as those of the last one."""
    loads = [record for record in files.loads if _table(record.get("counts")) is not None]
    return [record for record in loads if np.shape(record["counts"]) == np.shape(loads[-1]["counts"])]


def _groups(loads: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """Yield each kind and each source that has counts in any record."""
    for division in DIVISIONS:
        named = [record[division] for record in loads if isinstance(record.get(division), dict)]
        yield from ((division, name) for name in dict.fromkeys(name for counts in named for name in counts))


def _group(record: Record, division: str, name: str) -> object:
    groups = record.get(division)
    return groups.get(name) if isinstance(groups, dict) else None


def _table(value: object) -> Counts | None:
    """Return a table of layers by experts; None if it is none."""
    try:
        counts = np.array(value, dtype=np.int64)
    except (ValueError, TypeError, OverflowError):
        return None
    return counts if counts.ndim == 2 and counts.size and (counts >= 0).all() else None


def _encoded(counts: Counts) -> str:
    """Return each expert's share of its layer as a byte, relative to an even share."""
    even = np.maximum(counts.mean(1, keepdims=True), 1e-9)
    levels = np.clip(np.rint(counts / even * EVEN), 0, 255)
    levels = np.where((counts > 0) & (levels == 0), 1, levels).astype(np.uint8)
    return b64encode(levels.tobytes()).decode()


def _statistics(counts: Counts, everything: Counts) -> dict[str, Any]:
    """Return a group's share of all choices, its busiest expert over the mean, and its experts without a token."""
    means = np.maximum(counts.mean(1), 1e-9)
    peaks = counts.max(1) / means
    worst = int(peaks.argmax())
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    of_all = everything / np.maximum(everything.sum(1, keepdims=True), 1)
    return {
        "share": float(counts.sum() / max(1, everything.sum())),
        "peak": float(peaks[worst]),
        "layer": worst,
        "expert": int(counts[worst].argmax()),
        "dead": int((counts == 0).sum()),
        "distance": float(np.abs(shares - of_all).sum(1).mean() / 2),
    }
