"""Runs for comparing plans with measurements: recipe values, a row of samples, a tiny base."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.render.positions import sample_positions
from data.render.sample import Sample
from data.render.vision import VisionSpec, read_spec
from data.stream.batch import Batch, collate
from finetune.architecture.families import Family
from finetune.config import RunConfig
from finetune.files.hubconfig import read_family
from finetune.files.tiny import TinyModel, write_tiny
from finetune.planner.rank_layout import RankLayout
from finetune.planner.wire import Traffic
from finetune.ranks.engine_sizes import PERSISTENCE, REUSE, SUB_GROUP
from finetune.settings.recipes import load_recipe

FULL = tuple(
    f"adapters.{family}.mode=full"
    for family in ("attention", "experts", "router", "vision_blocks", "merger", "head", "embeddings", "norms")
)
COLLECTIVES = ("reduce_scatter", "allgather", "all_to_all_single")
MERGE = 2
Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: the tiny recipe with these values, and the token counts of the samples in each rank's row."""

    words: tuple[str, ...]
    samples: tuple[int, ...] = (96, 160)
    images: tuple[Grid, ...] = ()
    """Frames, rows and columns of patches; all images are in the first sample."""
    videos: tuple[Grid, ...] = ()
    supervised: int = 1
    """One token in this many carries loss."""
    persistence: int = PERSISTENCE
    reuse: int = REUSE
    """Elements within which the engine keeps gathered parameters; with 0 it does not prefetch either."""
    sub_group: int = SUB_GROUP
    """Elements of a rank that the optimizer updates at a time."""

    def config(self, *words: str) -> RunConfig:
        """Return the recipe with the case's values, for rows of its size."""
        seen = sum(t * h * w for t, h, w in (*self.images, *self.videos)) // MERGE**2
        sizes = (f"data.tokens_per_pack={sum(self.samples)}", f"data.vision_tokens_per_pack={max(seen, 1)}")
        config, problems = load_recipe("tiny-cpu", [*self.words, *sizes, *words])
        assert not problems, problems
        return config

    def layout(self, base: Family, world: int) -> RankLayout:
        """Return the planner's layout for this case: a CPU's attention, and the row's share of supervised tokens."""
        config = self.config()
        parallel = config.parallel
        assert parallel.recompute != "auto"
        return RankLayout(
            world=world,
            ep=parallel.ep,
            sp=parallel.sp,
            layers=base.text.num_hidden_layers,
            resident=parallel.resident == "frozen",
            recompute=parallel.recompute,
            tile_tokens=parallel.tile_tokens,
            offload=parallel.offload_activations,
            itemsize=4 if config.model.dtype == "float32" else 2,
            segmented=True,
            supervised_share=1 / self.supervised,
            device=False,
            persistence=self.persistence,
            reuse=self.reuse,
            sub_group=self.sub_group,
        )


def write_base(folder: Path, *, experts: int | None = 8) -> Path:
    """Write a small base whose tokens spread evenly over its experts, as a plan assumes."""
    from benchmarks.experts.even_router import spread_evenly  # loads transformers, which listing does not need

    model = TinyModel(
        hidden=64,
        layers=6,
        experts=experts,
        expert_hidden=48,
        heads=4,
        kv_heads=2,
        vision_hidden=96,
        vision_intermediate=224,
    )
    write_tiny(folder, model)
    if experts is not None:
        every = Case(words=(), samples=(300, 180, 124, 76), images=((1, 16, 16), (1, 16, 16)), videos=((2, 8, 8),))
        busiest = spread_evenly(folder, packed_row(every, read_family(folder), read_spec(folder)))
        assert max(busiest) < 1.25, busiest
    return folder


def packed_row(case: Case, base: Family, spec: VisionSpec, *, row: int = 0) -> Batch:
    """Return the case's samples in one row, without padding; the first sample starts with the images and videos.

    Rows with other numbers have the same sizes and other contents.
    """
    samples = [
        _sample(length, base, spec, case, (row, seed), *((case.images, case.videos) if seed == 0 else ((), ())))
        for seed, length in enumerate(case.samples)
    ]
    widths = (3 * spec.patch**2, 3 * spec.temporal * spec.patch**2)
    return collate(samples, keys=[item.key for item in samples], pad_id=0, multiple=1, widths=widths)


def _sample(
    length: int,
    base: Family,
    spec: VisionSpec,
    case: Case,
    seed: tuple[int, int],
    images: tuple[Grid, ...],
    videos: tuple[Grid, ...],
) -> Sample:
    """Make a sample of this length; one in `case.supervised` tokens carries loss."""
    generator = np.random.default_rng([*seed])
    ids = generator.integers(0, base.text.vocab_size - 40, length).astype(np.int32)
    kinds, at = np.zeros(length, dtype=np.int64), 1
    for kind, token, grids in ((1, base.image_token_id, images), (2, base.video_token_id, videos)):
        for frames, rows, columns in grids:
            for _ in range(frames):
                here = slice(at, at + rows * columns // MERGE**2)
                ids[here], kinds[here] = token, kind
                at = here.stop + 1
    assert at <= length, "more patches than the sample has tokens"
    patches = [
        generator.integers(0, 256, (sum(t * h * w for t, h, w in grids), 3 * frames * spec.patch**2), dtype=np.uint8)
        for grids, frames in ((images, 1), (videos, spec.temporal))
    ]
    shapes = [np.array(part, dtype=np.int32).reshape(-1, 3) for part in (images, videos)]
    return Sample(
        key=str(seed),
        input_ids=ids,
        loss_weights=(np.arange(length) % case.supervised == 0).astype(np.float32),
        positions=sample_positions(kinds, image_grids=shapes[0], video_grids=shapes[1], merge=MERGE),
        image_patches=patches[0],
        image_grids=shapes[0],
        video_patches=patches[1],
        video_grids=shapes[1],
    )


def collective_of(traffic: Traffic) -> str:
    """Return the collective that carries a kind of the plan's traffic."""
    if traffic.exchange:
        return "all_to_all_single"
    return "reduce_scatter" if traffic.kind.startswith("gradients") else "allgather"
