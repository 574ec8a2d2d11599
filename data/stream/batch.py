"""Tensors for training: a batch is the input of one forward pass on one rank, a step that of one optimiser step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.render.sample import Sample
from data.stores.cache import CacheCounts

DUMMY_TOKENS = 8  # a row for a rank without a pack; its loss weights are zero


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One packed row of T tokens. Images and videos are kept apart: one call of the tower takes all of one kind."""

    input_ids: Tensor  # int64 [1, T]
    loss_weights: Tensor  # float32 [1, T], of the token as a label; 0 for the first token of a sample and for padding
    positions: Tensor  # int64 [4, 1, T]: row 0 restarts with each sample, rows 1 to 3 are its time, height, width
    sample_ids: Tensor  # int32 [1, T], number of the sample in `keys`; -1 for padding
    cu_seq_lens: Tensor  # int32 [segments + 1], the same for queries and keys; padding is a segment of its own
    max_length: int  # of the longest segment
    image_patches: Tensor  # uint8 [patches, 3 * patch * patch]; the device normalises them and doubles them in time
    image_grids: Tensor  # int64 [images, 3]
    video_patches: Tensor  # uint8 [patches, 3 * temporal * patch * patch]
    video_grids: Tensor  # int64 [videos, 3]
    keys: tuple[str, ...]  # source/shard/key of each sample

    @property
    def attention(self) -> dict[str, Any]:
        """All four arguments for variable lengths. If one is missing, attention silently crosses samples."""
        cuts, longest = self.cu_seq_lens, self.max_length
        return {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts, "max_length_q": longest, "max_length_k": longest}


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """Divisors of the loss, summed over one rank's samples: one for each way to average."""

    tokens: float = 0.0  # sum of loss weights
    samples: float = 0.0  # samples that carry loss
    sqrt: float = 0.0  # square root of each sample's sum of loss weights, summed over samples

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums(
            tokens=self.tokens + other.tokens, samples=self.samples + other.samples, sqrt=self.sqrt + other.sqrt
        )


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that could not be read; `unit` is its number in every plan of this corpus."""

    unit: int
    source: str
    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"source {self.source}, shard {self.shard}, sample {self.key}: {self.reason}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One rank's share of one optimiser step. Every rank has the same number of batches; some may be dummies."""

    epoch: int
    step: int
    batches: tuple[Batch, ...]
    sums: LossSums  # of this rank only
    bad: tuple[BadSample, ...]  # left out of this rank's packs; pass those of all ranks to `quarantine`
    notes: tuple[str, ...]  # remarks about samples, for instance a video with fewer frames than requested
    tokens: int  # without padding and dummies
    images: int
    video_seconds: float  # of the parts that the records select
    wait_seconds: float  # time that the trainer waited for data
    reads: CacheCounts = field(default_factory=CacheCounts)  # of shards in stores, by this rank


def loss_sums(batch: Batch) -> LossSums:
    """Return the sums of one batch, computed from the same weights as the loss."""
    ids, weights = batch.sample_ids[0].long(), batch.loss_weights[0].double()
    owned = ids >= 0
    per_sample = torch.zeros(len(batch.keys), dtype=torch.float64).index_add(0, ids[owned], weights[owned])
    return LossSums(
        tokens=float(per_sample.sum()), samples=float((per_sample > 0).sum()), sqrt=float(per_sample.sqrt().sum())
    )


def label_places(batch: Batch) -> Tensor:
    """Return the indices of supervised tokens in the row, ascending, as int64."""
    return ((batch.loss_weights[0] != 0) & (batch.sample_ids[0] >= 0)).nonzero()[:, 0]


def media_places(batch: Batch, *, merge: int, image_id: int, video_id: int) -> tuple[Tensor, Tensor]:
    """Return the indices of a row's image tokens and of its video tokens.

    Raise ValueError if their number does not match the patches.
    """
    places = []
    for kind, token, patches in (("images", image_id, batch.image_patches), ("videos", video_id, batch.video_patches)):
        at_N, made = (batch.input_ids[0] == token).nonzero()[:, 0], len(patches) // merge**2
        if len(at_N) != made:
            raise ValueError(
                f"{', '.join(batch.keys)}: the row has {len(at_N)} tokens for {kind}, but their patches make {made}. "
                f"The chat template does not belong to this base"
            )
        places.append(at_N)
    return places[0], places[1]


def collate(
    samples: Sequence[Sample], *, keys: Sequence[str], pad_id: int, multiple: int, widths: tuple[int, int]
) -> Batch:
    """Join samples into one row, padded to a multiple; without samples it is a dummy.

    `widths` are the values per patch of an image and of a video; arrays without patches need them.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    used = sum(lengths)
    padding = -(-max(used, 1) // multiple) * multiple - used if samples else -(-DUMMY_TOKENS // multiple) * multiple
    segments = lengths + ([padding] if padding else [])
    weights = [sample.loss_weights.astype(np.float32) for sample in samples]
    for weight in weights:
        weight[0] = 0  # the token before it in the row belongs to another sample
    pad = np.arange(padding)
    owners = np.repeat([*range(len(samples)), *([-1] if padding else [])], segments)
    ids = np.concatenate([*(sample.input_ids for sample in samples), np.full(padding, pad_id)])
    positions = np.concatenate([*(sample.positions for sample in samples), np.stack([pad] * 4)], axis=1)
    return Batch(
        input_ids=torch.from_numpy(ids.astype(np.int64))[None],
        loss_weights=torch.from_numpy(np.concatenate([*weights, np.zeros(padding, dtype=np.float32)]))[None],
        positions=torch.from_numpy(positions.astype(np.int64))[:, None],
        sample_ids=torch.from_numpy(owners.astype(np.int32))[None],
        cu_seq_lens=torch.tensor([0, *np.cumsum(segments)], dtype=torch.int32),
        max_length=max(segments),
        image_patches=_join([sample.image_patches for sample in samples], widths[0]),
        image_grids=_grids([sample.image_grids for sample in samples]),
        video_patches=_join([sample.video_patches for sample in samples], widths[1]),
        video_grids=_grids([sample.video_grids for sample in samples]),
        keys=tuple(keys),
    )


def _join(arrays: list[np.ndarray[Any, Any]], width: int) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty((0, width), dtype=np.uint8), *arrays]))


def _grids(arrays: list[np.ndarray[Any, Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty((0, 3), dtype=np.int64), *arrays]).astype(np.int64))


def keys_of(batches: Sequence[Batch]) -> tuple[str, ...]:
    """Return the keys of all samples in these rows."""
    return tuple(key for batch in batches for key in batch.keys)
