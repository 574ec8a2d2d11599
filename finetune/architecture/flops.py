"""Floating-point operations of a step by part of the model: those that training needs, and those that the device runs.

A matrix of n elements costs 2n per row in forward, 2n for the gradient of its input, and 2n for its own gradient: 2n
if nothing below it trains, 4n if it is frozen but a gradient passes through it, 6n if it trains. LoRA's factors cost 6
times their own elements. Attention's scores cost 4 x heads x head_dim for each pair of tokens that see each other, and
twice that in backward; in a packed row the pairs are the sum of the samples' squares, halved by causality. The head
counts supervised tokens only, because only those reach it. Padding never counts.

The device also recomputes: attention's kernel computes its scores again in backward, and so does whatever
`parallel.recompute` drops. Norms, activations, routing and the embedding's look-up are left out, as in all published
figures. Loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from finetune.architecture.families import Family
from finetune.architecture.parts import MERGERS, PARTS, TOWER
from finetune.architecture.shapes import EMBEDDING, HEAD, parameter_shapes, part_of
from finetune.config import AdaptersConfig

if TYPE_CHECKING:
    from data.stream.batch import Batch

TEXT_PARTS = ("attention", "experts", "router", "mlp")
KERNEL_AGAIN = 0.5
"""Share of its forward that attention's kernel computes again in backward: one of two products."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The training of one part of the model."""

    mode: Literal["frozen", "lora", "full"] = "frozen"
    r: int = 0  # of its LoRA


@dataclass(frozen=True, kw_only=True)
class Work:
    """The amount of work in tokens and patches, without padding and dummies."""

    tokens: int = 0
    supervised: int = 0
    squares: int = 0  # sum over samples of their squared length
    patches: int = 0  # of images and videos
    frame_squares: int = 0  # sum over images and frame pairs of their squared number of patches

    def __add__(self, other: Work) -> Work:
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of one part; `again` counts those that the device runs a second time."""

    forward: float
    backward: float
    again: float = 0.0

    @property
    def model(self) -> float:
        """Return the operations that training needs, without recompute."""
        return self.forward + self.backward


def batch_work(batch: Batch) -> Work:
    """Return the work in one packed row; reads tensors on the host, so call it before the row goes to a device."""
    cuts, owners = batch.cu_seq_lens.tolist(), batch.sample_ids[0].tolist()
    lengths = [last - first for first, last in zip(cuts, cuts[1:], strict=False) if last > first and owners[first] >= 0]
    grids = [grid for of_kind in (batch.image_grids, batch.video_grids) for grid in of_kind.tolist()]
    frames = [(pairs, height * width) for pairs, height, width in grids]
    return Work(
        tokens=sum(lengths),
        supervised=int((batch.loss_weights > 0).sum()),
        squares=sum(length**2 for length in lengths),
        patches=sum(pairs * patches for pairs, patches in frames),
        frame_squares=sum(pairs * patches**2 for pairs, patches in frames),
    )


def trainings(adapters: AdaptersConfig) -> dict[str, Training]:
    """Return how each part trains according to the configuration's `adapters` section."""
    sections = {part: getattr(adapters, part) for part in PARTS}
    return {
        part: Training(mode=section.mode, r=section.r if section.mode == "lora" else 0)
        for part, section in sections.items()
    }


class FlopMeter:
    """Counts the operations of one model; `trains` says how its parts (of `shapes`) train, all others are frozen."""

    def __init__(
        self,
        family: Family,
        trains: Mapping[str, Training],
        *,
        recompute: Literal["none", "layer", "selective", "auto"] = "none",
    ) -> None:
        if recompute == "auto":
            raise ValueError("parallel.recompute: auto must be resolved before operations are counted; name a mode")
        self.family, self.recompute = family, recompute
        self._matrices = _matrices(family)
        self._trains = {part: training for part, training in trains.items() if training.mode != "frozen"}
        known = (*self._matrices, "norms", "embeddings", "pos_embed")
        unknown = [part for part in self._trains if part not in known]
        if unknown:
            raise ValueError(
                f"parts {', '.join(unknown)}: {family.name} has no such part; it has {', '.join(sorted(known))}"
            )
        for part, training in trains.items():
            if (training.mode == "lora") != (training.r > 0):
                raise ValueError(
                    f"part {part}: mode {training.mode} with r {training.r}; LoRA needs r >= 1, other modes r 0"
                )

    def count(self, work: Work) -> dict[str, Flops]:
        """Return the operations of each part for this work, including `attention_scores` and `vision_scores`."""
        tower = any(part in self._trains for part in TOWER)
        trunk = any(part != "head" for part in self._trains)
        rows = {part: work.tokens for part in TEXT_PARTS} | {"head": work.supervised}
        rows |= {"vision_blocks": work.patches, "patch_embed": work.patches}
        rows |= dict.fromkeys(MERGERS, work.patches // self.family.vision.spatial_merge_size**2)
        passes = {part: trunk for part in (*TEXT_PARTS, "head")} | {"vision_blocks": tower, "patch_embed": False}
        passes |= {part: tower or part in self._trains for part in MERGERS}
        counts = {part: self._linear(part, rows[part], passes=passes[part]) for part in rows if part in self._matrices}
        text, vision = self.family.text, self.family.vision
        pair = 4 * text.num_attention_heads * text.head_dim * text.num_hidden_layers
        counts["attention_scores"] = self._scores(pair * work.squares / 2, passes=trunk)
        counts["vision_scores"] = self._scores(4 * vision.hidden_size * vision.depth * work.frame_squares, passes=tower)
        return counts

    def model(self, work: Work) -> float:
        """Return the operations that training needs: the numerator of model FLOP/s and MFU."""
        return sum(part.model for part in self.count(work).values())

    def hardware(self, work: Work) -> float:
        """Return the operations that the device runs, including recomputed ones."""
        return sum(part.model + part.again for part in self.count(work).values())

    def _linear(self, part: str, rows: int, *, passes: bool) -> Flops:
        training = self._trains.get(part, Training())
        matrices = sum(out * into * share for out, into, share in self._matrices[part])
        factors = sum(training.r * (out + into) * share for out, into, share in self._factored(part))
        own = {"frozen": 0.0, "lora": 4.0 * factors, "full": 2.0 * matrices}[training.mode]
        forward = 2 * rows * (matrices + factors)
        again = forward if self.recompute != "none" and passes and part in (*TEXT_PARTS, "vision_blocks") else 0.0
        if self.recompute == "selective" and part == "experts":
            again = min(again, 2 * rows * factors)  # the wide products are kept or not needed again
        return Flops(forward=forward, backward=rows * (2 * matrices * passes + own), again=again)

    def _factored(self, part: str) -> list[tuple[int, int, float]]:
        return self._matrices[part] if self._trains.get(part, Training()).mode == "lora" else []

    def _scores(self, forward: float, *, passes: bool) -> Flops:
        if not passes:
            return Flops(forward=forward, backward=0.0)
        again = KERNEL_AGAIN * forward + (forward if self.recompute != "none" else 0.0)
        return Flops(forward=forward, backward=2 * forward, again=again)


def _matrices(family: Family) -> dict[str, list[tuple[int, int, float]]]:
    """Return each part's matrices as (out, in, number of such matrices that one row passes through)."""
    matrices: dict[str, list[tuple[int, int, float]]] = {}
    shapes = parameter_shapes(family)
    if family.tie_word_embeddings:
        shapes[HEAD] = shapes[EMBEDDING]
    experts = family.text.experts
    for name, shape in shapes.items():
        part = part_of(name)
        if len(shape) < 2 or part in ("embeddings", "pos_embed"):
            continue
        if part == "experts":
            assert experts is not None
            matrices.setdefault(part, []).append((shape[1], shape[2], float(experts.num_experts_per_tok)))
        else:
            matrices.setdefault(part, []).append((shape[0], math.prod(shape[1:]), 1.0))
    return matrices
