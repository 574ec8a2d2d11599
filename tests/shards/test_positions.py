"""Positions compared with transformers' get_rope_index for every mix, live and from a golden file."""

import json

import numpy as np
import places
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stock_positions import build_model, theirs

from data.render.positions import IMAGE, TEXT, VIDEO, sample_positions

GOLDEN = places.GOLDEN / "positions.json"
MIXES = {
    "text": [7],
    "image": [3, ("image", 4, 6), 5],
    "image first and last": [1, ("image", 2, 2), 1],
    "two images and a video": [4, ("image", 8, 4), 2, ("image", 2, 10), 3, ("video", 3, 4, 4), 6],
    "video": [2, ("video", 2, 6, 4), 2],
    "videos around an image": [2, ("video", 1, 4, 4), 1, ("image", 6, 6), 3, ("video", 4, 2, 8), 1],
}


def tokens(mix):
    """Return kinds [T] and the grids; text separates the frame pairs of a video, as timestamps do."""
    kinds, images, videos = [], [], []
    for part in mix:
        if isinstance(part, int):
            kinds += [TEXT] * part
        elif part[0] == "image":
            kinds += [IMAGE] * (part[1] * part[2] // 4)
            images.append((1, *part[1:]))
        else:
            for _ in range(part[1]):
                kinds += [TEXT] * 5 + [VIDEO] * (part[2] * part[3] // 4) + [TEXT]
            videos.append(part[1:])
    image_grids, video_grids = (np.array(grids, dtype=np.int64).reshape(-1, 3) for grids in (images, videos))
    return np.array(kinds, dtype=np.int8), image_grids, video_grids


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.mark.parametrize("name", MIXES)
def test_positions_equal_get_rope_index_and_the_golden_file(model, name):
    kinds, images, videos = tokens(MIXES[name])
    found = sample_positions(kinds, image_grids=images, video_grids=videos, merge=2)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found[0], np.arange(len(kinds)))
    np.testing.assert_array_equal(found[1:], theirs(model, kinds, images, videos))
    assert found[1:].tolist() == json.loads(GOLDEN.read_text())[name]


part = st.one_of(
    st.integers(1, 9),
    st.tuples(st.just("image"), st.integers(1, 6).map(lambda n: 2 * n), st.integers(1, 6).map(lambda n: 2 * n)),
    st.tuples(st.just("video"), *[st.integers(1, 3).map(lambda n: 2 * n)] * 3),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(part, min_size=1, max_size=8))
def test_any_mix_equals_get_rope_index(model, mix):
    separated = [piece for chosen in mix for piece in (1, chosen)]
    kinds, images, videos = tokens(separated)
    found = sample_positions(kinds, image_grids=images, video_grids=videos, merge=2)
    np.testing.assert_array_equal(found[1:], theirs(model, kinds, images, videos))


def test_a_sample_without_tokens_has_no_positions():
    none = np.zeros((0, 3), dtype=np.int64)
    assert sample_positions(np.zeros(0, np.int8), image_grids=none, video_grids=none, merge=2).shape == (4, 0)


def write_golden():
    """Run this file with PYTHONPATH=.:tests/harness to write it. Written with transformers 5.23.0."""
    built = build_model()
    rows = {name: theirs(built, *tokens(mix)).tolist() for name, mix in MIXES.items()}
    GOLDEN.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items()) + "\n}\n")


if __name__ == "__main__":
    write_golden()
