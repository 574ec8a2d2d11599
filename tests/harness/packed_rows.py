"""Samples of every mix for the small models of `tiny_moe`, packed rows of them, and transformers' own results."""

import numpy as np
import torch
from tiny_moe import END, IMAGE, START, VIDEO
from torch import nn

from data.render.positions import sample_positions
from data.render.sample import Sample
from data.render.vision import VisionSpec, normalise
from data.stream.batch import Batch, collate
from finetune.tracking.token_groups import TokenGroups

SPEC = VisionSpec(patch=4, merge=2, temporal=2)
WIDTHS = (3 * 4 * 4, 3 * 2 * 4 * 4)
GRIDS = {"i": [(1, 4, 6)], "j": [(1, 2, 8)], "v": [(3, 4, 2)], "w": [(2, 2, 4)]}
"""Media by letter: i and j are images, v and w videos of three and two frame pairs."""


def sample(mix: str, *, length: int = 9, seed: int = 0) -> Sample:
    """Return text around the media that the letters name; all but the first third of the text is supervised."""
    generator = np.random.default_rng([seed, *mix.encode()])
    ids, kinds = [], []

    def text(count: int) -> None:
        ids.extend(generator.integers(0, 160, count).tolist())
        kinds.extend([0] * count)

    text(3)
    for letter in mix:
        for frames, rows, columns in GRIDS[letter]:
            for _ in range(frames):
                count, image = rows * columns // 4, letter in "ij"
                ids.extend([START, *[IMAGE if image else VIDEO] * count, END])
                kinds.extend([0, *[1 if image else 2] * count, 0])
        text(2)
    text(length)
    grids = {k: [g for x in mix if x in k for g in GRIDS[x]] for k in ("ij", "vw")}
    arrays = {k: np.array(v, dtype=np.int32).reshape(-1, 3) for k, v in grids.items()}
    patches = [
        generator.integers(0, 256, (int(a.prod(1).sum()), w), dtype=np.uint8)
        for a, w in zip(arrays.values(), WIDTHS, strict=True)
    ]
    kinds_T = np.array(kinds)
    weights = (kinds_T == 0) & (np.arange(len(ids)) > len(ids) // 3)
    return Sample(
        key=mix or "text",
        input_ids=np.array(ids, dtype=np.int32),
        loss_weights=weights.astype(np.float32),
        positions=sample_positions(kinds_T, image_grids=arrays["ij"], video_grids=arrays["vw"], merge=2),
        image_patches=patches[0],
        image_grids=arrays["ij"],
        video_patches=patches[1],
        video_grids=arrays["vw"],
    )


def token_groups() -> TokenGroups:
    """Return the numbers of these samples' groups: four kinds and the source `s`, behind one without samples."""
    return TokenGroups(["none", "s"], image_id=IMAGE, video_id=VIDEO, control_ids=(START, IMAGE, VIDEO, END))


def row(*mixes: str, length: int = 9) -> Batch:
    """Return a padded row of samples by their letters; without samples, a dummy."""
    samples = [sample(mix, length=length + number) for number, mix in enumerate(mixes)]
    return collate(samples, keys=[f"s/{mix or 'text'}" for mix in mixes], pad_id=0, multiple=4, widths=WIDTHS)


def alone(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """Run each sample of a row alone through transformers, with transformers' positions; return weighted losses."""
    losses, images, videos = [], 0, 0
    cuts = batch.cu_seq_lens.tolist()
    for first, last in zip(cuts[: len(batch.keys)], cuts[1:], strict=False):
        ids, weights = batch.input_ids[:, first:last], batch.loss_weights[0, first:last]
        kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        seen = {}
        for name, patches, grids, start, key in (
            ("image", batch.image_patches, batch.image_grids, images, ("pixel_values", "image_grid_thw")),
            ("video", batch.video_patches, batch.video_grids, videos, ("pixel_values_videos", "video_grid_thw")),
        ):
            count, here = int((kinds == (1 if name == "image" else 2)).sum()), 0
            if not count:
                continue
            ends = (grids.prod(1) // 4).cumsum(0)
            chosen = (ends > start) & (ends <= start + count)
            here = slice(4 * start, 4 * (start + count))
            seen |= {key[0]: normalise(patches[here], spec=SPEC).to(model.dtype), key[1]: grids[chosen]}
        images, videos = images + int((kinds == 1).sum()), videos + int((kinds == 2).sum())
        logits = model(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **seen).logits[0, :-1].float()
        ce = nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        losses.append((ce * weights[1:]).sum())
    return losses
