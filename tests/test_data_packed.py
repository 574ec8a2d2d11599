"""Packed equals separate, every mix in one row, through transformers' own model; and the guard is real."""

import pytest
import torch
from bases import base
from corpora import renderer as small_renderer
from mixes import MIXES, OWN_MIXES, built
from transformers import AutoConfig, Qwen3VLMoeForConditionalGeneration

from data.batch import collate
from data.config import ChatConfig, ImageConfig, VideoConfig
from data.sample import Renderer
from data.vision import normalise, read_spec

NAMES = [*MIXES, *OWN_MIXES]


@pytest.fixture(scope="module")
def renderer():
    return Renderer(
        base("tiny", None),
        image=ImageConfig(min_tokens=4, max_tokens=12),
        video=VideoConfig(max_tokens=24),
        chat=ChatConfig(),
    )


@pytest.fixture(scope="module")
def samples(renderer):
    return [built(renderer, name) for name in NAMES]


@pytest.fixture(scope="module")
def model():
    config = AutoConfig.from_pretrained(base("tiny", None))
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    found = Qwen3VLMoeForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.ndim > 1:  # spread out, so that a leak shows in the loss
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return found


def pack(renderer, samples, multiple=1):
    keys = [sample.key for sample in samples]
    return collate(samples, keys=keys, pad_id=renderer.pad_id, multiple=multiple, widths=renderer.patch_widths)


def media(batch):
    spec = read_spec(base("tiny", None))
    found = {}
    if len(batch.image_grids):
        found |= {"pixel_values": normalise(batch.image_patches, spec=spec), "image_grid_thw": batch.image_grids}
    if len(batch.video_grids):
        found |= {"pixel_values_videos": normalise(batch.video_patches, spec=spec), "video_grid_thw": batch.video_grids}
    return found


def kinds(model, batch):
    ids = batch.input_ids
    return (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()


def losses(logits, batch):
    """Weighted loss of each sample."""
    labels = batch.input_ids[0, 1:]
    each = torch.nn.functional.cross_entropy(logits[0, :-1].float(), labels, reduction="none")
    each = each * batch.loss_weights[0, 1:]
    owners = batch.sample_ids[0, 1:].long()
    inside = owners >= 0
    return torch.zeros(len(batch.keys)).index_add(0, owners[inside], each[inside])


@pytest.fixture(scope="module")
def separate(model, renderer, samples):
    """Each sample alone, with the positions transformers makes itself."""
    found = []
    with torch.no_grad():
        for sample in samples:
            batch = pack(renderer, [sample])
            logits = model(
                input_ids=batch.input_ids,
                attention_mask=torch.ones_like(batch.input_ids),
                mm_token_type_ids=kinds(model, batch),
                **media(batch),
            ).logits
            found.append(losses(logits, batch))
    return torch.cat(found)


@pytest.mark.parametrize("order", ["as listed", "reversed"])
def test_packed_equals_separate(model, renderer, samples, separate, order):
    chosen = list(range(len(samples)))[:: 1 if order == "as listed" else -1]
    batch = pack(renderer, [samples[number] for number in chosen], multiple=32)
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False, **batch.attention, **media(batch)
        ).logits
    found = losses(logits, batch)
    assert (found > 1).all()
    torch.testing.assert_close(found, separate[chosen], rtol=1e-5, atol=1e-5)


WRONG = {
    "cache left on": lambda batch, model: {"position_ids": batch.positions},
    "a mask of ones": lambda batch, model: {
        "position_ids": batch.positions,
        "attention_mask": torch.ones_like(batch.input_ids),
        "use_cache": False,
    },
    "three rows of positions": lambda batch, model: {"position_ids": batch.positions[1:], "use_cache": False},
    "no positions": lambda batch, model: {"mm_token_type_ids": kinds(model, batch), "use_cache": False},
}


@pytest.mark.parametrize("way", WRONG)
def test_the_known_wrong_ways_leak(model, renderer, samples, separate, way):
    batch = pack(renderer, samples)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, **WRONG[way](batch, model), **media(batch)).logits
    assert (losses(logits, batch) - separate).abs().max() > 1e-2


def test_dummy_row_passes_through_the_model(model):
    renderer = small_renderer()
    batch = pack(renderer, [])
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False, **batch.attention
        ).logits
    assert losses(logits, batch).shape == (0,)
    assert torch.isfinite(logits).all()
