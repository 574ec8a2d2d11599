"""Samples of every mix compared with the model's own processor: tokens, kinds, pixels, positions and lengths."""

import json
import pickle
import re
from functools import cache

import numpy as np
import oracle
import pytest
import torch
from bases import THINKING, TOKENIZERS, base
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import clip, encode, moving, picture
from mixes import MIXES, OWN_MIXES, asked, built, facts, media, record
from PIL import Image
from stock_positions import build_model, theirs
from transformers import AutoTokenizer

from data.config import ChatConfig, ImageConfig, VideoConfig
from data.format.facts import ImageFacts, VideoFacts
from data.format.record import parse_record
from data.render.sample import Renderer
from data.render.timestamps import box_texts, clock, seconds
from data.render.vision import normalise, read_spec

SMALL = ImageConfig(min_tokens=4, max_tokens=150)


@cache
def renderer(name="tiny", *, image=SMALL, video=None, chat=None, template=None):
    return Renderer(base(name, template), image=image, video=video or VideoConfig(), chat=chat or ChatConfig())


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", MIXES)
def test_a_sample_equals_the_output_of_the_models_processor(name, tokenizer):
    question = asked(name)
    wanted = oracle.ask(oracle.conversation, folder=str(base(tokenizer)), **question)
    found = built(renderer(tokenizer, image=ImageConfig()), name)
    np.testing.assert_array_equal(found.input_ids, wanted["input_ids"][0])
    np.testing.assert_array_equal(found.positions[1:], positions_of(wanted))
    spec = read_spec(base(tokenizer))
    for kind, suffix in (("image", ""), ("video", "_videos")):
        patches, grids = getattr(found, f"{kind}_patches"), getattr(found, f"{kind}_grids")
        assert patches.dtype == np.uint8
        assert grids.tolist() == wanted.get(f"{kind}_grid_thw", np.zeros((0, 3))).tolist()
        pixels = normalise(torch.from_numpy(patches), spec=spec).numpy()
        np.testing.assert_array_equal(pixels, wanted.get(f"pixel_values{suffix}", np.zeros((0, 1536), np.float32)))


def positions_of(wanted):
    none = np.zeros((0, 3), dtype=np.int64)
    grids = [wanted.get(f"{kind}_grid_thw", none) for kind in ("image", "video")]
    return theirs(build_model(), wanted["mm_token_type_ids"][0].astype(np.int8), *grids)


VIDEOS = {
    "default": VideoConfig(),
    "flat": VideoConfig(layout="flat"),
    "clock": VideoConfig(timestamps="hms", fps=3.0),
    "mixed": VideoConfig(timestamps="mixed", layout="flat", frame_cap=False, max_tokens=60, min_frames=2),
}


@pytest.mark.parametrize("video", VIDEOS)
def test_lengths_without_pixels_are_exactly_those_of_the_sample(video):
    made = renderer(video=VIDEOS[video])
    for name in (*MIXES, *OWN_MIXES):
        of = record(name)
        found, known = built(made, name), facts(of)
        vision = made.count_vision(of, *known)
        assert made.count_text(of, *known) + vision.tokens == len(found.input_ids), name
        assert vision.patches == len(found.image_patches) + len(found.video_patches), name
        assert found.positions.shape == (4, len(found.input_ids))
        assert found.loss_weights[0] == 0
        assert found.loss_weights.sum() > 0


def text_of(found):
    """Return the sample's text, with each run of placeholders as a single one."""
    tokenizer = AutoTokenizer.from_pretrained(base())
    pads = {tokenizer.convert_tokens_to_ids(token) for token in ("<|image_pad|>", "<|video_pad|>")}
    ids = [int(token) for token in found.input_ids]
    kept = [token for at, token in enumerate(ids) if token not in pads or ids[at - 1] != token]
    return tokenizer.decode(kept)


def test_a_document_carries_loss_on_its_words_only():
    found = built(renderer(), "document")
    tokenizer = AutoTokenizer.from_pretrained(base())
    supervised = tokenizer.decode(found.input_ids[found.loss_weights > 0].tolist())
    assert supervised == "A text  goes on  and ends <|im_end|>"
    assert len(found.image_grids) == 2
    assert len(found.video_grids) == 1


PAIR = "<|vision_start|><|video_pad|><|vision_end|>"


def test_layouts_and_timestamps_of_a_video():
    def user_turn(**video):
        text = text_of(built(renderer(video=VideoConfig(**video)), "frames"))
        return text.partition("user\n")[2].partition("<|im_end|>")[0]

    assert user_turn() == f"<|vision_start|><1.5 seconds>{PAIR}<3.5 seconds>{PAIR}<|vision_end|> what?"
    assert user_turn(layout="flat") == f"<1.5 seconds>{PAIR}<3.5 seconds>{PAIR} what?"
    assert user_turn(layout="flat", timestamps="hms") == f"<00:00:01>{PAIR}<00:00:03>{PAIR} what?"
    both = {user_turn(layout="flat", timestamps="mixed"), text_of(built(renderer(), "frames"))}
    assert len(both) == 2


def test_real_times_are_written_if_the_frame_rate_varies():
    text = text_of(built(renderer(video=VideoConfig(fps=1.0, min_frames=6)), "varying"))
    assert re.findall("<([0-9.]+) seconds>", text) == ["0.1", "1.1", "4.0"]


def test_mixed_timestamps_depend_on_the_sample_alone():
    made = renderer(video=VideoConfig(timestamps="mixed"))

    def text(number):
        raw = {"v": 1, "id": f"{number}", "messages": [{"role": "user", "content": "<video>"}], "videos": ["3.mp4"]}
        return text_of(made.build(parse_record(raw, shard="s", key="k"), [], [media()["3.mp4"]], key="k"))

    texts = [text(number) for number in range(12)]
    assert 2 < sum("seconds" in each for each in texts) < 10
    assert texts == [text(number) for number in range(12)]


def test_stamps():
    assert (seconds(3.0), seconds(0.25), seconds(3601.96)) == ("<3.0 seconds>", "<0.2 seconds>", "<3602.0 seconds>")
    assert (clock(3.0), clock(59.99), clock(3725.5), clock(360000)) == (
        "<00:00:03>",
        "<00:00:59>",
        "<01:02:05>",
        "<100:00:00>",
    )


def test_boxes_are_relative_to_the_upright_image():
    text = text_of(built(renderer(), "boxes"))
    assert 'At {"bbox_2d": [500, 250, 1000, 500]}, [250, 1000].' in text
    assert "Where is the <|im_end|> mark?" in text
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = encode(Image.fromarray(picture(400, 300)), exif=exif)
    assert text_of(renderer().build(record("boxes"), [sideways], [], key="k")) == text


@pytest.mark.parametrize(("kind", "box"), [("norm1", [0.2, 0.25, 0.4, 0.5]), ("norm1000", [200, 250, 400, 500])])
def test_relative_boxes(kind, box):
    raw = {"v": 1, "messages": [{"role": "user", "content": "<image><image><bbox>"}], "images": ["0.png", "1.png"]}
    raw["objects"] = {"bbox": [box], "bbox_type": kind, "image_id": [1]}
    sizes = [ImageFacts(height=10, width=10), ImageFacts(height=300, width=400)]
    assert box_texts(parse_record(raw, shard="s", key="k"), sizes) == ["[200, 250, 400, 500]"]


def test_a_box_outside_its_image_is_refused():
    with pytest.raises(ValueError, match=r"objects.bbox\[0\] is \[200.0, 75.0, 400.0, 150.0\], outside"):
        box_texts(record("boxes"), [ImageFacts(height=300, width=399)])


def test_a_single_frame_is_seen_twice_at_one_time():
    found = built(renderer(), "single")
    assert found.video_grids.tolist()[0][0] == 1
    frames = found.video_patches.reshape(-1, 2, 256 * 3)
    np.testing.assert_array_equal(frames[:, 0], frames[:, 1])


def test_fewer_frames_than_requested_are_noted():
    found = built(renderer(video=VideoConfig(max_frames=4, fps=5.0)), "video")
    assert found.notes == ("video 1 (3.mp4): 4 frames of 3 s instead of 15, because max_frames is 4",)


@pytest.mark.parametrize(
    ("name", "images", "videos", "message"),
    [
        ("image", [b"?"], [], r"image 1 \(0.png\): not a readable image"),
        ("image", [encode(Image.new("RGB", (2500, 10)))], [], r"image 1 \(0.png\): 2500 x 10 pixels: one side is more"),
        ("video", [], [b"?"], r"video 1 \(3.mp4\): not a readable video"),
        ("video", [], [clip(moving(4, 16, 6000))], r"video 1 \(3.mp4\): .* pixels: one side is more than 200"),
        ("range", [], [clip(moving(4))], r"video 1 \(3.mp4\): no frame lies between 1 and 2.5 s"),
        ("frames", [], [[encode(Image.new("RGB", (64, 64)))] * 2 + [b"?"]], "video 1 frame 2: not a readable image"),
        ("frames", [], [[encode(Image.new("RGB", (64, 30 + n))) for n in range(3)]], "video 1: the frames of a video"),
    ],
)
def test_bad_media_are_named(name, images, videos, message):
    with pytest.raises(ValueError, match=message):
        renderer().build(record(name), images, videos, key="k")


def test_bad_sizes_are_named_without_pixels():
    with pytest.raises(ValueError, match=r"image 1 \(0.png\): 2500 x 10 pixels"):
        renderer().count_vision(record("image"), [ImageFacts(height=10, width=2500)], [])
    thin = VideoFacts(height=40, width=9000, frames=9, duration=1.0, rate=9.0)
    with pytest.raises(ValueError, match=r"video 1 \(3.mp4\): 9000 x 40 pixels"):
        renderer().count_vision(record("video"), [], [thin])


def test_fingerprints_change_with_settings_and_files():
    plain = renderer()
    assert renderer(video=VideoConfig(timeout_seconds=1)).fingerprint == plain.fingerprint
    bigger = renderer(image=ImageConfig(max_tokens=200))
    assert bigger.text_fingerprint == plain.text_fingerprint
    others = [renderer(video=VideoConfig(layout="flat")), renderer(chat=ChatConfig(thinking="mask"))]
    assert len({made.fingerprint for made in (plain, bigger, *others)}) == 4
    assert len({made.text_fingerprint for made in (plain, *others)}) == 3


TEXTS = st.one_of(st.text(max_size=30), st.sampled_from(["<image>", "<|im_end|>", "<think>", "</think>x", "<bbox>"]))
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXTS},
        optional={"loss": st.sampled_from([True, False, 0.5]), "thinking": TEXTS},
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("template", [None, THINKING], ids=["instruct", "thinking"])
@settings(max_examples=80, deadline=None, derandomize=True)
@given(TURNS)
def test_any_conversation_is_built_to_its_length_or_refused(template, messages):
    made = renderer(template=template)
    marks = sum(message["content"].count("<image>") for message in messages)
    try:
        of = parse_record({"v": 1, "messages": messages, "images": ["0.png"] * marks}, shard="s", key="k")
        found = made.build(of, [media()["0.png"]] * marks, [], key="k")
    except ValueError:
        return
    sizes = [ImageFacts(height=300, width=400)] * marks
    assert len(found.input_ids) == made.count_text(of, sizes, []) + made.count_vision(of, sizes, []).tokens
    assert (found.loss_weights > 0).any() <= of.supervised


def test_a_renderer_survives_pickling_for_a_worker():
    here = renderer()
    there = pickle.loads(pickle.dumps(here))
    assert there.fingerprint == here.fingerprint
    np.testing.assert_array_equal(built(there, "image and videos").input_ids, built(here, "image and videos").input_ids)


def test_a_folder_without_a_base_is_refused(tmp_path):
    configs = {"image": ImageConfig(), "video": VideoConfig(), "chat": ChatConfig()}
    with pytest.raises(ValueError, match="has no tokenizer_config.json"):
        Renderer(tmp_path, **configs)
    for file in base().iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    words = json.loads((tmp_path / "tokenizer.json").read_text())
    words["added_tokens"] = [token for token in words["added_tokens"] if token["content"] != "<|video_pad|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    for text, message in (
        ("{}", "chat_template.json: chat_template is missing"),
        ("[", "chat_template.json is not JSON"),
    ):
        (tmp_path / "chat_template.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Renderer(tmp_path, **configs)
    (tmp_path / "chat_template.json").unlink()
    settings = (tmp_path / "tokenizer_config.json").read_text().replace("<|video_pad|>", "<|other|>")
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ValueError, match=r"the tokenizer has no token <\|video_pad\|>"):
        Renderer(tmp_path, **configs)
