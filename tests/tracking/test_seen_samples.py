"""The data that a run keeps: samples of the first step with their own pictures, and the licences of sources."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from corpora import corpus_of, renderer, sample_json, write_shards
from packed_rows import SPEC, WIDTHS, sample
from tiny_moe import IMAGE, VIDEO

from data.render.vision import unpatch
from data.shards.reader import SampleReader
from data.stream.batch import Batch, collate
from data.stream.licences import LOOKED_AT, NONE, source_licences
from finetune.tracking.seen_samples import PART_CHARACTERS, PARTS, SeenSample, chosen_samples

MEDIA_IDS = (IMAGE, VIDEO)


def _row(**mixes: str) -> Batch:
    samples = [sample(mix, seed=seed) for seed, mix in enumerate(mixes.values())]
    keys = [f"{name[0]}/shard/{name}" for name in mixes]
    return collate(samples, keys=keys, pad_id=0, multiple=4, widths=WIDTHS)


def test_a_sample_comes_with_its_own_pictures() -> None:
    mixes = {"a1": "ij", "b1": "", "c1": "vi", "d1": "w"}
    seen = chosen_samples([_row(**mixes)], SPEC, media_ids=MEDIA_IDS, most=4)
    assert [one.source for one in seen] == ["a", "b", "c", "d"]
    for at, (one, mix) in enumerate(zip(seen, mixes.values(), strict=True)):
        alone = sample(mix, seed=at)
        assert one.ids_T.tolist() == alone.input_ids.tolist()
        wanted = []
        for patches, grids in ((alone.image_patches, alone.image_grids), (alone.video_patches, alone.video_grids)):
            ends = [0, *np.cumsum(grids.prod(1)).tolist()]
            wanted += [unpatch(patches[a:b], grid, SPEC)[0] for (a, b), grid in zip(pairwise(ends), grids, strict=True)]
        assert len(one.frames) == len(wanted)
        for frame, pixels in zip(one.frames, wanted, strict=True):
            assert np.array_equal(frame.pixels(), pixels)


def test_sources_take_turns_and_samples_with_pictures_come_first() -> None:
    batches = [_row(a1="", a2="i", a3="v"), _row(b1="", b2="")]
    order = ["a/shard/a2", "b/shard/b1", "a/shard/a3", "b/shard/b2", "a/shard/a1"]
    for most in (5, 3):
        chosen = chosen_samples(batches, SPEC, media_ids=MEDIA_IDS, most=most)
        assert [one.key for one in chosen] == order[:most]
    assert [one.frames for one in chosen_samples([_row(a1="")], None, media_ids=MEDIA_IDS, most=4)] == [()]


def test_the_text_of_a_sample_is_bounded_and_keeps_what_is_supervised() -> None:
    reader = renderer()
    ids = reader.encode("one two three ") * 1000
    long = SeenSample(
        key="s/x/1",
        ids_T=torch.tensor(ids),
        weights_T=torch.tensor([float(at >= 40) for at in range(len(ids))]),
        frames=(),
    ).record(reader)
    (question, is_supervised), (answer, supervised) = long["parts"]
    assert (is_supervised, supervised) == (False, True)
    assert len(question) < PART_CHARACTERS < len(answer) < PART_CHARACTERS + 50
    assert " more characters ... " in answer
    assert long["tokens"] - long["supervised"] == 40
    turns = SeenSample(
        key="s/x/2",
        ids_T=torch.tensor(ids),
        weights_T=torch.tensor([float(at % 2) for at in range(len(ids))]),
        frames=(),
    ).record(reader)
    assert len(turns["parts"]) == PARTS + 1
    assert turns["parts"][-1] == [f" ... {len(ids) - PARTS} more parts", False]


def test_licences_are_those_of_samples_spread_over_the_source(tmp_path: Path) -> None:
    def make(number: int) -> dict:
        return sample_json(number) | ({"license": "CC-BY-4.0"} if number >= 60 else {})

    shards = write_shards(tmp_path / "part", make=make)
    corpus = corpus_of({"part": shards})
    reader = SampleReader()
    found = source_licences(corpus, reader)
    assert found == {"part": {NONE: 20, "CC-BY-4.0": 10}}
    assert sum(found["part"].values()) <= LOOKED_AT < 90
    shards[2].unlink()
    assert source_licences(corpus, SampleReader()) == {"part": {NONE: 20}}
