"""Other tools' rows to shards: all styles, cleaned media, bad rows refused with reasons, resumed builds."""

import base64
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace

import numpy as np
import pytest
from limits import LIMIT_S
from media_files import clip, encode, moving, picture
from PIL import Image

from data.format.record import parse_record
from data.prepare.build import LOCK, BuildOptions, build_held, build_shards, building
from data.prepare.clean import clean_image, clean_video
from data.prepare.converted import READERS, shards_of_rows
from data.prepare.folder_lock import this_process
from data.prepare.progress import Progress
from data.render.image import decode_image
from data.rows.containers import count_rows, read_rows
from data.rows.convert import convert_row
from data.rows.files import RowSource, stamp_of_rows
from data.shards.reader import SampleReader, load_index
from data.shards.sidecar import read_note, write_note
from launchers.cli import main

KEY = "data.sources.s.path"
PNG = encode(Image.fromarray(picture(40, 60)))


def record_of(row):
    """Return the record of a row, without the places of its media."""
    raw, ignored = convert_row(row)
    assert ignored == []
    places = {name: raw.pop(name) for name in ("images", "videos") if name in raw}
    raw |= {name: [f"{n}.jpg" for n in range(len(found))] for name, found in places.items()}
    return parse_record(raw, shard="s", key="k"), places


def conversation(record):
    return [
        (message.role, "".join(part.text or f"<{part.kind}>" for part in message.contents))
        for message in record.messages
    ]


USER, ANSWER = ("user", "<image>What?"), ("assistant", "A horse.")
STYLES = {
    "ms-swift": {
        "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A horse."}],
        "images": ["a.jpg"],
    },
    "ms-swift without a mark": {
        "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A horse."}],
        "images": ["a.jpg"],
    },
    "LLaMA-Factory sharegpt": {
        "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A horse."}],
        "images": ["a.jpg"],
    },
    "LLaMA-Factory alpaca": {"instruction": "<image>What?", "input": "", "output": "A horse.", "images": ["a.jpg"]},
    "OpenAI": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "a.jpg"}}, {"type": "text", "text": "What?"}],
            },
            {"role": "assistant", "content": "A horse."},
        ]
    },
    "Qwen": {
        "image": "a.jpg",
        "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A horse."}],
    },
    "Qwen parts": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A horse."}]},
        ]
    },
}


@pytest.mark.parametrize("style", STYLES)
def test_every_style_becomes_the_same_record(style):
    record, places = record_of(STYLES[style])
    assert conversation(record) == [USER, ANSWER]
    assert places == {"images": ["a.jpg"]}


def test_roles_tools_weights_history_and_systems_of_other_tools():
    swift = {
        "system": "Be brief.",
        "tools": json.dumps([{"name": "look"}]),
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "tool_call", "content": json.dumps({"name": "look", "arguments": {"at": 1}})},
            {"role": "tool_response", "content": "seen"},
            {"role": "assistant", "content": "ok", "loss_scale": 0.5},
        ],
    }
    record, _ = record_of(swift)
    assert [message.role for message in record.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert record.messages[2].tool_calls[0].arguments == {"at": 1}
    assert record.messages[4].weight == 0.5
    assert record.tools == ({"name": "look"},)
    openai = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "a", "name": "Ann"},
            {"role": "assistant", "content": "b", "weight": 0},
        ]
    }
    assert record_of(openai)[0].messages[0].role == "system"
    assert not record_of(openai)[0].supervised
    alpaca = {"instruction": "c", "input": "d", "output": "e", "history": [["a", "b"]]}
    assert [text for _, text in conversation(record_of(alpaca)[0])] == ["a", "b", "c\nd", "e"]
    video = {"video": "v.mp4", "conversations": [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "!"}]}
    assert record_of(video)[1] == {"videos": ["v.mp4"]}


def test_unread_columns_are_reported():
    assert convert_row({**STYLES["Qwen"], "channel": "x", "score": 2})[1] == ["channel", "score"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "row is a list; write one JSON object"),
        (
            {"text": "x"},
            "row has the columns text, which is no known shape. The nearest is captions, which",
        ),
        ({"messages": "x"}, "messages is a str; write a list of turns"),
        ({"messages": ["x"]}, r"messages\[0\] is 'x'; write a JSON object"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\].role is 'bot'; known: human, user, gpt"),
        ({"messages": [{"role": "user", "content": "x", "audio": "y"}]}, r"messages\[0\].audio cannot be shown"),
        ({"messages": [], "image": "a", "images": ["b"]}, "image and images are both given"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"role is \"\['user'\]\"; known: human"),
        ({"instruction": 5, "output": "b"}, "instruction is 5; write text"),
        ({"instruction": "a", "input": {"x": 1}, "output": "b"}, "input is {'x': 1}; write text"),
        ({"instruction": "a", "output": "b", "history": True}, "history is True; write .question, answer. pairs"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "history holds 'x'; write .question, answer. pairs"),
    ],
)
def test_rows_without_a_known_form_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        convert_row(row)


def test_rows_are_read_from_lines_and_lists(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"a": 1}\n\nrubbish\n{"a": 2}\n')
    found = list(read_rows(lines))
    assert [number for number, _ in found] == [1, 3, 4]
    assert isinstance(found[1][1], ValueError)
    (tmp_path / "a.json").write_text('[{"a": 1}]')
    assert list(read_rows(tmp_path / "a.json")) == [(1, {"a": 1})]
    (tmp_path / "b.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="b.json is not a list of JSON rows: it begins with .*write a list of rows"):
        list(read_rows(tmp_path / "b.json"))
    (tmp_path / "c.json").write_text("[")
    with pytest.raises(ValueError, match="c.json is not a list of JSON rows: Expecting value"):
        list(read_rows(tmp_path / "c.json"))


def oriented(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "SecretCamera"
    exif.get_ifd(0x8825)[1] = "N"
    return encode(Image.fromarray(picture(40, 60)), kind, exif=exif, quality=95)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_images_are_turned_upright_and_lose_their_metadata(kind, orientation):
    data = oriented(kind, orientation)
    assert b"SecretCamera" in data
    cleaned, extension = clean_image(data, name="x")
    assert b"SecretCamera" not in cleaned
    assert b"Exif" not in cleaned
    with Image.open(io.BytesIO(cleaned)) as image:
        assert not image.getexif()
        assert image.size == ((60, 40) if orientation == 1 else (40, 60))
    before = decode_image(data, name="x").numpy().astype(int)
    after = decode_image(cleaned, name="x").numpy().astype(int)
    if orientation == 1:
        assert np.array_equal(after, before)  # not re-encoded
        assert extension == {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
    else:
        assert np.abs(after - before).mean() < 3


def test_a_comment_and_a_colour_profile_part_ways():
    data = encode(Image.fromarray(picture(40, 60)), "JPEG", comment=b"at home", icc_profile=b"profile" * 9)
    cleaned, _ = clean_image(data, name="x")
    assert b"at home" not in cleaned
    assert b"profile" in cleaned


def test_videos_lose_their_metadata_without_moving_a_byte():
    data = clip(moving(6))
    at = data.find(b"udta")
    assert at > 0
    cleaned, extension = clean_video(data)
    assert extension == "mp4"
    assert len(cleaned) == len(data)
    assert b"udta" not in cleaned
    assert b"Lavf" not in cleaned[at:]
    from media_files import decode_all

    assert np.array_equal(np.stack(decode_all(cleaned)), np.stack(decode_all(data)))
    assert clean_video(clip(moving(2), kind="matroska"))[1] == "mkv"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_row(number):
    return {"messages": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": f"{number}!"}]}


def with_image(place):
    return {**STYLES["ms-swift"], "images": [place]}


def test_build_embeds_media_refuses_bad_rows_and_counts_columns(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "v.mp4").write_bytes(clip(moving(12, 64, 64)))
    video = {"messages": [{"role": "user", "content": "<video>"}, {"role": "assistant", "content": "x"}]}
    rows = [
        with_image("a.png") | {"channel": "x"},
        with_image({"path": "a.png", "max_pixels": 4096}),
        with_image("data:image/png;base64," + base64.b64encode(PNG).decode()),
        with_image({"bytes": base64.b64encode(PNG).decode()}),
        video | {"videos": [{"video": "v.mp4", "fps": 1}]},
        video | {"videos": [["a.png", "a.png"]]},
        with_image({"path": "v.mp4", "range": [0, 10]}),
        with_image("gone.png"),
        with_image("s3://bucket/a.png"),
        with_image({"bytes": "???"}),
        with_image("data:image/png,xx"),
        with_image(3),
        with_image({"path": "a.png", "range": "x"}),
        {"messages": [{"role": "user", "content": "hi"}]},
        with_image("a.png") | {"images": ["a.png", "a.png"]},
    ]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    with source.open("a") as file:
        file.write("rubbish\n")
    report = build_shards(source, tmp_path / "out", BuildOptions(name="t"))
    assert (report.written, report.rejected, report.ignored) == (6, 10, {"channel": 1})
    rejects = {
        r["row"]: r["reason"] for r in map(json.loads, (tmp_path / "out/rejects.jsonl").read_text().splitlines())
    }
    expected = {
        7: "images[0]: not a readable image",
        8: "gone.png: No such file",
        9: "only paths, http:// and https:// are read",
        10: "images[0] is not base64",
        11: "a data: url must be base64",
        12: "images[0] is 3; write a path",
        13: "images[0].range is 'x'; write [offset, length]",
        14: "messages carry no loss",
        15: "images has 2 items, but the messages contain 1 <image> mark",
        16: "Expecting value",
    }
    assert sorted(rejects) == sorted(expected)
    for row, reason in expected.items():
        assert reason in rejects[row]
    (shard,) = report.shards
    index = load_index(shard)
    assert not index.problems
    reader = SampleReader()
    record, members = reader.sample(shard, 1)
    assert record.images[0].max_pixels == 4096
    assert list(members) == ["0.png"]
    assert [reader.sample(shard, n)[0].videos[0].member for n in (4, 5)] == ["0.mp4", None]
    assert reader.record(shard, 5).videos[0].rate == 2.0


def test_build_may_refer_to_media_instead(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media/a.png").write_bytes(PNG)
    source = write_rows(tmp_path / "media/rows.jsonl", [with_image("a.png")])
    (shard,) = build_shards(source, tmp_path / "out", BuildOptions(name="t", media="reference")).shards
    reader = SampleReader()
    record, members = reader.sample(shard, 0)
    assert record.images[0].path == "../media/a.png"
    assert not members
    assert reader.media(record, members, shard.parent) == ([PNG], [])


def test_an_interrupted_build_continues_and_workers_change_nothing(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [text_row(n) for n in range(25)] + [{"text": "bad"}])
    options = BuildOptions(name="t", samples_per_shard=5)
    whole = build_shards(source, tmp_path / "whole", options, jobs=2)
    assert (len(whole.shards), whole.written, whole.rejected, whole.reused) == (5, 25, 1, 0)

    def stop(rows, _):
        if rows == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards(source, tmp_path / "out", options, progress=stop)
    half = sorted((tmp_path / "out").glob("*.tar"))
    assert len(half) == 3
    times = [path.stat().st_mtime_ns for path in half]
    report = build_shards(source, tmp_path / "out", options)
    assert (report.written, report.rejected, report.reused) == (25, 1, 3)
    assert [path.stat().st_mtime_ns for path in half] == times
    for one, other in zip(whole.shards, report.shards, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert not list((tmp_path / "out").glob("*.part"))


def test_a_folder_of_something_else_is_refused(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [text_row(1)])
    build_shards(source, tmp_path / "out", BuildOptions(name="t"))
    write_rows(source, [text_row(2)])
    with pytest.raises(ValueError, match="out contains shards of another build: the source file changed"):
        build_shards(source, tmp_path / "out", BuildOptions(name="t"))
    write_rows(source, [text_row(1)])
    with pytest.raises(
        ValueError, match="--media was 'embed', now it is 'reference', --allow-private-addresses was Fa"
    ):
        build_shards(source, tmp_path / "out", BuildOptions(name="t", media="reference", allow_private=True))
    write_rows(tmp_path / "other.jsonl", [text_row(1)])
    with pytest.raises(ValueError, match=r"they were built from \.\./rows.jsonl, not \.\./other.jsonl"):
        build_shards(tmp_path / "other.jsonl", tmp_path / "out", BuildOptions(name="t"))
    (tmp_path / "out/build.json").unlink()
    with pytest.raises(ValueError, match="out already contains shards; build into an empty folder"):
        build_shards(source, tmp_path / "out", BuildOptions(name="t"))
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="blank.jsonl contains no row: it is empty"):
        build_shards(tmp_path / "blank.jsonl", tmp_path / "out3", BuildOptions(name="t"))
    for name in ("../t", "a b", ".t", ""):
        with pytest.raises(ValueError, match="--name is '.*'; shard names begin with letters"):
            BuildOptions(name=name)
    with pytest.raises(ValueError, match="none.jsonl does not exist"):
        build_shards(tmp_path / "none.jsonl", tmp_path / "out2", BuildOptions(name="t"))


def test_unused_copies_of_earlier_versions_are_removed(tmp_path, caplog):
    source = tmp_path / "rows.jsonl"

    def convert(number):
        write_rows(source, [text_row(number)])
        words = f"""from pathlib import Path; from data.prepare.converted import shards_of_rows
from data.rows.files import RowSource
shards_of_rows(RowSource(path=Path({str(source)!r})), "{KEY}", cache_dir=None, jobs=1, limit=0)"""
        subprocess.run([sys.executable, "-c", words], check=True)
        return tmp_path / f"rows-{stamp_of_rows(RowSource(path=source))}"

    def convert_here(number):
        write_rows(source, [text_row(number)])
        return shards_of_rows(RowSource(path=source), KEY, cache_dir=None, jobs=1, limit=0)[0].parent

    read_by_us = convert_here(1)
    ended = convert(2)
    assert list((ended / READERS).iterdir()) == []
    assert ended.is_dir()
    killed, stranger, older = (tmp_path / f"rows-{name}" for name in ("killed", "other", "older"))
    for copy in (killed, stranger, older):
        shutil.copytree(ended, copy)
    write_note(stranger / "build.json", read_note(stranger / "build.json") | {"source": "../other/rows.jsonl"})
    (older / READERS).rmdir()
    holder = replace(this_process(), started=1)  # a process of that number, but not this one
    (killed / READERS / "x.json").write_text(json.dumps(asdict(holder)))
    newest = convert_here(3)
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {path.name for path in (read_by_us, stranger, older, newest)}
    assert f"removed {killed}, the converted copy of an earlier version of {source}" in caplog.text
    holder = replace(this_process(), host="elsewhere")
    for reader in (read_by_us / READERS).iterdir():
        reader.write_text(json.dumps(asdict(holder)))
    convert(4)
    assert read_by_us.is_dir()


def test_a_source_of_rows_is_converted_once_and_again_when_it_changes(tmp_path, caplog):
    source = write_rows(tmp_path / "rows.jsonl", [text_row(n) for n in range(3)] + [{"text": "bad"}])
    cache = tmp_path / "cache"
    first = shards_of_rows(RowSource(path=source), KEY, cache_dir=cache, jobs=1, limit=1)
    times = [path.stat().st_mtime_ns for path in first]
    again = shards_of_rows(RowSource(path=source), KEY, cache_dir=cache, jobs=1, limit=1)
    assert again == first
    assert [path.stat().st_mtime_ns for path in again] == times
    with pytest.raises(
        ValueError,
        match=r"data.sources.s.path: refused 1 of 4 rows of .*, and data.max_bad_samples is 0; .*rejects.*shards build",
    ):
        shards_of_rows(RowSource(path=source), KEY, cache_dir=cache, jobs=1, limit=0)
    other = shards_of_rows(RowSource(path=source), "another name", cache_dir=cache, jobs=1, limit=1)
    assert other == first, "what a recipe calls its source is nothing of the shards"
    moved = tmp_path.with_name(tmp_path.name + " moved")
    shutil.copytree(tmp_path, moved)
    kept = shards_of_rows(RowSource(path=moved / "rows.jsonl"), KEY, cache_dir=moved / "cache", jobs=1, limit=1)
    assert kept == [moved / path.relative_to(tmp_path) for path in first]
    write_rows(source, [text_row(9)])
    assert shards_of_rows(RowSource(path=source), KEY, cache_dir=None, jobs=1, limit=0)[0].parent.parent == tmp_path
    assert caplog.text.count(f"1 row of {source} refused and left out; the reasons are in") == 3
    assert f"are in {first[0].parent / 'rejects.jsonl'}" in caplog.text
    with pytest.raises(ValueError, match="data.sources.s.path is .*no.jsonl., which does not exist"):
        shards_of_rows(RowSource(path=tmp_path / "no.jsonl"), KEY, cache_dir=None, jobs=1, limit=0)


def test_two_builds_cannot_share_a_folder(tmp_path, capsys):
    source = write_rows(tmp_path / "rows.jsonl", [text_row(1)])
    words = ["shards", "build", str(source), "--out", str(tmp_path / "out")]
    with building(tmp_path / "out", waits=False):
        assert main(words) == 2
    assert f"{tmp_path / 'out'} is in use by process {os.getpid()} on " in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert main(words) == 0
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_second_run_waits_for_the_conversion_of_the_first_and_uses_it(tmp_path, caplog):
    source = write_rows(tmp_path / "rows.jsonl", [text_row(1)])
    place = tmp_path / f"rows-{stamp_of_rows(RowSource(path=source))}"
    with ThreadPoolExecutor(1) as pool:
        with building(place, waits=False):
            second = pool.submit(shards_of_rows, RowSource(path=source), KEY, cache_dir=None, jobs=1, limit=0)
            while "waiting for another run, whose shards will be used" not in caplog.text:
                assert not second.done(), second.result()
            first = build_held(source, place, BuildOptions(name="part"), jobs=1, progress=None)
            time_of_first = first.shards[0].stat().st_mtime_ns
        assert second.result(LIMIT_S) == list(first.shards)
    assert first.shards[0].stat().st_mtime_ns == time_of_first


@pytest.mark.parametrize("note", ["build.json", ".t-000000.tar.json"])
def test_a_damaged_note_of_a_build_is_not_trusted(tmp_path, note):
    source = write_rows(tmp_path / "rows.jsonl", [text_row(1), {"text": "bad"}])
    report = build_shards(source, tmp_path / "out", BuildOptions(name="t"))
    shard = report.shards[0].read_bytes()
    path = tmp_path / "out" / note
    for text in (path.read_text().replace("1", "2", 1), "{", "[]", "{}"):
        path.write_text(text)
        if note == "build.json":
            with pytest.raises(ValueError, match="build.json is damaged, or of an older moetune; remove"):
                build_shards(source, tmp_path / "out", BuildOptions(name="t"))
            continue
        again = build_shards(source, tmp_path / "out", BuildOptions(name="t"))
        assert (again.written, again.rejected, again.reused) == (1, 1, 0)
        assert again.shards[0].read_bytes() == shard


@contextmanager
def no_room_beyond(size):
    """Limit the size of files, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("missing", [512, 9000])  # too little space for the last block, or for a row
def test_a_build_on_a_full_disk_names_the_path_and_leaves_no_part(tmp_path, missing):
    source = write_rows(tmp_path / "rows.jsonl", [text_row("long " * 4000), text_row(1)])
    options = BuildOptions(name="t")
    whole = build_shards(source, tmp_path / "whole", options).shards[0].stat().st_size
    with no_room_beyond(whole - missing), pytest.raises(OSError, match="too large: .*out/t-000000.tar"):
        build_shards(source, tmp_path / "out", options)
    assert [path.name for path in (tmp_path / "out").iterdir() if "part" in path.name] == []
    assert build_shards(source, tmp_path / "out", options).written == 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal_and_a_line_in_a_file(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [text_row(n) for n in range(4)])
    assert (count_rows(source), count_rows(tmp_path / "x.json")) == (4, 0)
    screen, file = Terminal(), io.StringIO()
    for out in (screen, file):
        with Progress("rows", count_rows(source), out=out) as show:
            show(2, "1 refused, at the second")
            show(3, "1 refused")
            show(4, "1 refused")
    half = "rows: [" + "#" * 15 + " " * 15 + "] 2/4 rows, 1 refused, at the second"
    end = "rows: [" + "#" * 30 + "] 4/4 rows, 1 refused"
    assert screen.getvalue().replace(" " * len(", at the second") + "\n", "\n") == f"\r{half}\r{end}\n"
    assert file.getvalue() == f"{end}\n"


def test_progress_without_a_total_leaves_no_partial_line():
    screen, file = Terminal(), io.StringIO()
    for out in (screen, file):
        with Progress("rows", 0, out=out) as show:
            show(7_000)
        with Progress("rows", 3, out=out):
            pass
        assert list(Progress("rows", 0, out=out).over("ab")) == ["a", "b"]
    assert screen.getvalue().startswith("\rrows: 7,000 rows\n")
    assert file.getvalue() == "rows: 7,000 rows\n"


def test_converting_a_source_shows_progress_once(tmp_path, capsys):
    source = write_rows(tmp_path / "rows.jsonl", [text_row(n) for n in range(4)])
    shards_of_rows(RowSource(path=source), KEY, cache_dir=None, jobs=1, limit=0)
    assert "] 4/4 rows, 0 refused, recognised as messages (columns messages)\n" in capsys.readouterr().err
    shards_of_rows(RowSource(path=source), KEY, cache_dir=None, jobs=1, limit=0)
    assert capsys.readouterr().err == ""
