"""Packed samples have the losses they have alone, through transformers' own model; the known wrong ways do not.

Alone, a sample goes in as transformers wants it (its kinds of tokens, no positions), so the model's own rule for
positions and its own attention are what the packed row is held to.
"""

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bases import base
from mixes import MIXES, OWN_MIXES, built
from transformers import AutoModelForImageTextToText

from data.config import ChatConfig, ImageConfig, VideoConfig
from data.sample import Renderer
from data.vision import normalise, read_spec

TOLERANCE = 1e-5


@cache
def model():
    return AutoModelForImageTextToText.from_pretrained(base(), attn_implementation="sdpa", dtype=torch.float32).eval()


@cache
def samples():
    made = Renderer(
        base(), image=ImageConfig(min_tokens=4, max_tokens=40), video=VideoConfig(max_tokens=48), chat=ChatConfig()
    )
    return {name: built(made, name) for name in (*MIXES, *OWN_MIXES)}


def pixels(chosen):
    """What the tower takes: all images in one call, all videos in another, as transformers' model wants them."""
    found = {}
    for kind, suffix in (("image", ""), ("video", "_videos")):
        patches = np.concatenate([getattr(sample, f"{kind}_patches") for sample in chosen])
        if len(patches):
            grids = np.concatenate([getattr(sample, f"{kind}_grids") for sample in chosen])
            found[f"pixel_values{suffix}"] = normalise(torch.from_numpy(patches), spec=read_spec(base()))
            found[f"{kind}_grid_thw"] = torch.from_numpy(grids).long()
    return found


def ids(chosen):
    return torch.from_numpy(np.concatenate([sample.input_ids for sample in chosen])).long().unsqueeze(0)


def kinds(row):
    config = model().config
    return (row == config.image_token_id).int() + 2 * (row == config.video_token_id).int()


def forward(row, **inputs):
    with torch.no_grad():
        return model()(input_ids=row, **inputs).logits[0]


def losses(logits, chosen):
    """Of each sample by itself: the weighted mean over its own labels."""
    found, at = [], 0
    for sample in chosen:
        end = at + len(sample.input_ids)
        labels = torch.from_numpy(sample.input_ids).long()
        weights = torch.from_numpy(sample.loss_weights)
        each = F.cross_entropy(logits[at : end - 1], labels[1:], reduction="none")
        found.append(((each * weights[1:]).sum() / weights.sum()).item())
        at = end
    return found


@cache
def alone(name):
    sample = samples()[name]
    row = ids([sample])
    logits = forward(row, mm_token_type_ids=kinds(row), use_cache=False, **pixels([sample]))
    return losses(logits, [sample])[0]


ROWS = {
    "all": [*MIXES, *OWN_MIXES],
    "all backwards": [*OWN_MIXES, *MIXES][::-1],
    "one mix twice": ["image and videos", "image and videos"],
    "text behind media": ["video", "text", "text"],
    "media behind text": ["text", "image"],
}


@pytest.mark.parametrize("row", ROWS)
def test_packed_losses_equal_separate_losses(row):
    names = ROWS[row]
    chosen = [samples()[name] for name in names]
    logits = forward(ids(chosen), position_ids=positions(chosen), use_cache=False, **pixels(chosen))
    assert losses(logits, chosen) == pytest.approx([alone(name) for name in names], abs=TOLERANCE)


def positions(chosen):
    return torch.from_numpy(np.concatenate([sample.positions for sample in chosen], axis=1)).long().unsqueeze(1)


def wrong_ways(chosen):
    row, right = ids(chosen), positions(chosen)
    yield "the cache left on", {"position_ids": right}
    yield "a mask of ones", {"position_ids": right, "attention_mask": torch.ones_like(row), "use_cache": False}
    yield "three rows of positions", {"position_ids": right[1:], "use_cache": False}
    yield "no positions", {"mm_token_type_ids": kinds(row), "use_cache": False}


def test_the_four_known_wrong_ways_leak_between_samples():
    """If one of these stops leaking, what this project forbids can be allowed again."""
    names = ROWS["all"]
    chosen = [samples()[name] for name in names]
    wanted = np.array([alone(name) for name in names])
    for way, inputs in wrong_ways(chosen):
        found = np.array(losses(forward(ids(chosen), **inputs, **pixels(chosen)), chosen))
        assert found[0] == pytest.approx(wanted[0], abs=TOLERANCE), f"{way}: nothing is before the first sample"
        assert np.abs(found - wanted)[1:].max() > 100 * TOLERANCE, f"{way} leaks no more"
