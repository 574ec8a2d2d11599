"""The record: worked examples parse, everything wrong is refused by name, and writing is the inverse of reading."""

import json
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from data.format.content import Content
from data.format.media import media_members
from data.format.record import RecordError, parse_record, record_to_json

DOC = ROOT / "docs" / "data-format.md"
EXAMPLES = dict(re.findall(r"^### (.+?)\n```json\n(.+?)```", DOC.read_text(), re.M | re.S))
TEXT = {
    "v": 1,
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
}


def parse(raw, **options):
    return parse_record(raw, shard="a.tar", key="k1", **options)


def changed(**changes):
    return {**TEXT, **changes}


def turn(**changes):
    return changed(messages=[{"role": "assistant", "content": "yes", **changes}])


def video(**changes):
    return changed(messages=[{"role": "assistant", "content": "<video>"}], videos=[changes])


def image(value, **changes):
    return changed(messages=[{"role": "assistant", "content": "<image>"}], images=[value], **changes)


def boxes(content="<bbox>", **objects):
    messages = [{"role": "assistant", "content": "<image>" + content}]
    return changed(messages=messages, images=["0.jpg"], objects=objects)


def test_examples_cover_every_mix():
    assert len(EXAMPLES) == 13
    for part in (
        "Text",
        "One image",
        "interleaved",
        "Video",
        "Image and video",
        "range",
        "Document",
        "Tools",
        "Thinking",
    ):
        assert any(part in name for name in EXAMPLES), part


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_parses_and_survives_a_round_trip(name):
    record = parse(EXAMPLES[name])
    assert record.supervised
    assert parse(record_to_json(record)) == record
    assert parse(json.dumps(record_to_json(record)).encode()) == record
    members = set(media_members(record.images, record.videos))
    assert parse(EXAMPLES[name], members=members) == record


def test_marks_become_parts_in_order_and_parts_keep_literal_marks():
    record = parse(EXAMPLES["Several images, interleaved"])
    kinds = [part.kind for part in record.messages[0].contents]
    assert kinds == ["text", "image", "text", "image", "text", "image", "text"]
    literal = parse(EXAMPLES["A literal mark in text"]).messages[0].contents
    assert literal[0] == Content("text", "In HTML, is <image> a tag? See ")
    assert [part.kind for part in literal] == ["text", "image"]


def test_loss_defaults_by_role_and_takes_a_weight():
    turns = parse(EXAMPLES["Several turns, one of them not trained on"]).messages
    assert [turn.weight for turn in turns] == [0, 0, 0, 1]
    assert parse(turn(loss=0.25)).messages[0].weight == 0.25
    assert not parse(turn(loss=False)).supervised


def test_both_spellings_of_tool_calls_and_thinking_read_alike():
    plain = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}], "thinking": "hm"}
    function = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": '{"x": 1}'}}
    other = {"role": "assistant", "content": None, "tool_calls": [function], "reasoning_content": "hm"}
    assert parse(changed(messages=[plain])) == parse(changed(messages=[other]))


WRONG = [
    ("[1]", "record is a list"),
    ("{", "Expecting property name"),
    ("[" * 100_000, "nested more than 100 deep"),
    ('{"v": 1, "messages": NaN}', "NaN is not JSON"),
    ('{"v": 1, "messages": ' + "9" * 400 + "}", "a number of 400 digits, 999999999999..., is none"),
    ('{"v": 1, "messages": ' + "9" * 5000 + "}", "a number of 5000 digits"),
    (b'\xff{"v": 1}', "can't decode|codec"),
    ({"messages": []}, "v is missing"),
    (changed(v=2), "v is 2; this moetune reads version 1"),
    (changed(v=True), r"v is True \(bool\); write int"),
    (changed(messages=[]), "messages is empty"),
    (changed(messages="hi"), r"messages is 'hi' \(str\); write list"),
    (changed(messages=["hi"]), r"messages\[0\] is 'hi' \(str\); write a JSON object"),
    (changed(mesages=1), "record has unknown keys 'mesages'; known: v, objects, id"),
    (changed(id=3), r"id is 3 \(int\); write str"),
    (turn(role="human"), r"messages\[0\].role is 'human'; write one of system, user, assistant, tool"),
    (turn(content=None), r"messages\[0\].content is missing"),
    (turn(content="\ud800"), r"content holds half a character"),
    (turn(content=["x"]), r"content\[0\] is 'x'; write"),
    (turn(content=[{"type": "audio"}]), r"content\[0\].type is 'audio'; write one of text, image"),
    (turn(content=[{"type": "image", "image": "x.jpg"}]), r"content\[0\] has unknown keys 'image'"),
    (turn(loss="yes"), r"messages\[0\].loss is 'yes' \(str\)"),
    (turn(loss=-1), r"messages\[0\].loss is -1; write true, false or a weight"),
    (turn(loss=float("inf")), r"messages\[0\].loss is inf; write a finite number"),
    (turn(thinking="a", reasoning_content="b"), r"messages\[0\].thinking is given twice"),
    (turn(role="user", thinking="a"), r"messages\[0\].role is 'user'; only an assistant"),
    (turn(tool_calls=[{"name": "f", "arguments": "[1]"}]), r"tool_calls\[0\].arguments is text that is not"),
    (turn(tool_calls=[{"name": "f", "arguments": "{"}]), "Expecting property name"),
    (turn(content="<image>"), "images has 0 items, but the messages contain 1 <image> mark"),
    (changed(images=["0.jpg"]), "images has 1 item, but the messages contain 0 <image> marks"),
    (changed(videos=["0.mp4"]), "videos has 1 item, but the messages contain 0 <video> marks"),
    (image(3), r"images\[0\] is 3 \(int\); write a JSON object"),
    (image({}), r"images\[0\] needs exactly one of member, path, url .* got none"),
    (image({"member": "a.jpg", "path": "b"}), r"images\[0\] needs exactly one of .* got member and path"),
    (image("A.jpg"), r"images\[0\].member is 'A.jpg'; write what follows the key, lower-case"),
    (image("a/b.jpg"), r"images\[0\].member is 'a/b.jpg'"),
    (image({"url": "pipe:cat x"}), r"images\[0\].url is 'pipe:cat x'; only http"),
    (image({"path": "a", "range": [1]}), r"images\[0\].range is \[1\]; write \[offset, length\]"),
    (image({"path": "a", "range": [1, 0]}), r"images\[0\].range is \[1, 0\]"),
    (image({"member": "a.jpg", "range": [0, 4]}), r"images\[0\].range belongs to a path or url"),
    (image({"member": "a.jpg", "max_pixels": 0}), r"max_pixels is 0; write a whole number of at least 1"),
    (video(member="a.mp4", fps=2, num_frames=3), r"videos\[0\].fps and num_frames exclude each other"),
    (video(member="a.mp4", fps=0), r"videos\[0\].fps is 0; write a number above 0"),
    (video(member="a.mp4", start=-1), r"videos\[0\].start is -1; write a number at least 0"),
    (video(member="a.mp4", start=3, end=2), r"videos\[0\].end is 2, not after start 3"),
    (video(member="a.mp4", rate=2), r"videos\[0\].times and rate describe a list of frames"),
    (video(frames=["0.jpg"]), r"videos\[0\].frames needs either times .* or rate"),
    (video(frames=["0.jpg"], times=[0, 1]), r"videos\[0\].times has 2 entries for 1 frames"),
    (video(frames=["0.jpg", "1.jpg"], times=[1, 1]), r"videos\[0\].times must rise"),
    (video(frames=["0.jpg"], times=["x"]), r"videos\[0\].times\[0\] is 'x'; write seconds"),
    (video(frames=["0.jpg"], rate=1, range=[0, 1]), r"videos\[0\].range belongs to a path or url"),
    (video(member="a.mp4", time_origin="now"), r"time_origin is 'now'; write one of clip, video"),
    (boxes(bbox=[[1, 2, 3]]), r"objects.bbox\[0\] is \[1, 2, 3\]; write \[x, y\] or \[x1, y1, x2, y2\]"),
    (boxes(bbox=[[5, 2, 3, 4]]), r"objects.bbox\[0\] is .*; write x1, y1, x2, y2 with x1 < x2"),
    (boxes(bbox=[[0, 0, 2, 2]], bbox_type="norm1"), r"objects.bbox\[0\] is .*; norm1 runs from 0 to 1"),
    (boxes(bbox=[[0, 0, 2, 2]], bbox_type="abs"), "objects.bbox_type is 'abs'"),
    (boxes(bbox=[[0, 0, 2, 2]], image_id=[0, 0]), "objects.image_id is .*; write one image number for each box"),
    (boxes(bbox=[[0, 0, 2, 2]], image_id=[1]), r"objects.image_id is \[1\], but the sample has 1 image"),
    (boxes(bbox=[[0, 0, 2, 2]], point=[[1, 1]]), "objects.point and objects.bbox are both given"),
    (boxes(bbox=[]), "objects.bbox has 0 items, but the messages contain 1 <bbox> or <point> mark"),
    (boxes("<point>", bbox=[[0, 0, 2, 2]]), r"objects.bbox\[0\] is .*, but its mark is <point>"),
    (boxes("<ref-object>", ref=[1]), r"objects.ref\[0\] is 1; write the name"),
    (boxes("<ref-object>", ref=["\ud800"]), r"objects.ref\[0\] holds half a character"),
    (changed(tools=[{"name": "\ud800"}]), r"tools\[0\] holds half a character"),
    (turn(tool_calls=[{"name": "f", "arguments": {"x": "\ud800"}}]), "arguments holds half a character"),
    (boxes("<ref-object>"), "objects.ref has 0 items, but the messages contain 1 <ref-object>"),
    (
        changed(messages=[{"role": "assistant", "content": "<bbox>"}], objects={"bbox": [[0, 0, 1, 1]]}),
        "objects.bbox has boxes or points but the sample has no image",
    ),
]


@pytest.mark.parametrize(("raw", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_wrong_record_is_refused_with_shard_key_and_field(raw, message):
    with pytest.raises(RecordError, match=message) as caught:
        parse(raw)
    assert str(caught.value).startswith("shard a.tar, sample k1: ")


def test_members_must_match_both_ways():
    with pytest.raises(
        RecordError, match=r"media names \['0.jpg'\] but the shard has \[\] for this key \(half a sample"
    ):
        parse(image("0.jpg"), members=[])
    with pytest.raises(RecordError, match=r"media does not name \['1.jpg'\]"):
        parse(image("0.jpg"), members=["0.jpg", "1.jpg"])


def test_error_survives_a_worker_process():
    error = pickle.loads(pickle.dumps(RecordError(shard="s", key="k", reason="why")))
    assert (error.shard, error.key, error.reason, str(error)) == ("s", "k", "why", "shard s, sample k: why")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = ["role", "content", "loss", "tool_calls", "thinking"]
turns = st.fixed_dictionaries({}, optional={key: json_values for key in KEYS} | {"role": st.just("assistant")})
TOP = {"id": json_values, "images": json_values, "videos": json_values, "objects": json_values, "tools": json_values}
records = st.fixed_dictionaries({"v": st.just(1), "messages": st.lists(turns, max_size=2) | json_values}, optional=TOP)


@given(records)
def test_any_json_parses_or_is_refused_by_name(raw):
    try:
        record = parse(raw)
    except RecordError as error:
        where = str(error)[:30]
    else:
        where = "shard a.tar, sample k1: "
        assert parse(record_to_json(record)) == record
    assert where.startswith("shard a.tar, sample k1: ")


@given(st.binary(max_size=80) | st.text(max_size=80))
def test_any_bytes_are_refused_by_name(raw):
    with pytest.raises(RecordError, match="shard a.tar, sample k1: "):
        parse(raw)


@given(st.lists(st.sampled_from(["a", "<image>", "<", "<video>", "image>", "<bbox>", ""]), max_size=6), st.booleans())
def test_content_round_trips(pieces, as_list):
    text = "".join(pieces)
    content = [{"type": "text", "text": text}] if as_list else text
    messages = [{"role": "assistant", "content": content}]
    raw = {"v": 1, "messages": messages}
    if not as_list:
        raw["images"] = ["0.jpg"] * max(text.count("<image>"), text.count("<bbox>") and 1)
        raw["videos"] = ["0.mp4"] * text.count("<video>")
        raw["objects"] = {"bbox": [[0, 0, 1, 1]] * text.count("<bbox>")}
        if len(raw["images"]) != text.count("<image>"):
            return
    record = parse(raw)
    assert parse(record_to_json(record)) == record


@pytest.mark.parametrize("name", ["group", "license"])
def test_an_empty_group_or_license_stays_in_a_rewritten_record(name):
    """`shards split` rewrites records, and changes none."""
    raw = {"v": 1, "messages": [{"role": "assistant", "content": "a"}]}
    for record in (parse(raw | {name: ""}), parse(raw)):
        assert parse(record_to_json(record)) == record
