"""Inputs that once ended a command or a run: every reader names them, and continues with the other samples."""

import base64
import io
import json
import struct
import zlib
from fractions import Fraction

import av
import pytest
from corpora import renderer
from media_files import encode, picture
from PIL import Image

from data.config import DataConfig, SourceConfig
from data.format.tar import TarWriter
from data.open import open_corpus, open_stream
from data.prepare.audit import AuditOptions, audit_shards
from data.prepare.build import BuildOptions, build_shards
from data.render.image import decode_image
from data.shards.reader import SampleReader, load_index

# colour planes for which the decoder raises RuntimeError
AVIF = zlib.decompress(
    base64.b85decode(
        "c-muNU{FXasVqn=%S>Yc0uY^>nP!-qnV9D5Xy^nKdYzkElE?r7iWw<6MNl?FL1uCZ0~+8f$SlbPvlxL`E;A=T8N_h`@fjhajKV-#0f;p+"
        "GxO5mYNddjR3<1dvCP2GIX@>KY*$uhK~Vva_RcIw&Ii&WnZ*UEQ2RKbSfC)YA`>L=hl2ye=SeIxbZ%te0SO5w=jRmVCFfKCP3C1_YXAy~XB"
        "Onb`~-9u3nNoA3&=&eDTyUQ3|t%%9Q!jG+M1n=gyg@sw~F5X|Nqee28IcyeKvJ>0LN%L2>"
    )
)


def png_of(width, height):
    """Return a PNG that claims this size and contains almost nothing."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    rows = b"IDAT" + zlib.compress(bytes(100))
    chunks = b""
    for chunk in (head, rows):
        chunks += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + chunks


def boxes(depth):
    """Return an MP4 of nested boxes."""
    body = b""
    for _ in range(depth):
        body = struct.pack(">I", len(body) + 8) + b"moov" + body
    return b"\0\0\0\x10ftypisom\0\0\0\0" + body


def growing():
    """Return a video whose later frames are larger than its first."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuvj420p"
        for number, side in enumerate((64, 64, 64, 96, 96, 96)):
            packet = av.Packet(encode(Image.fromarray(picture(side, side)), "JPEG"))
            packet.stream, packet.pts, packet.dts = stream, number * 100, number * 100
            packet.time_base, packet.is_keyframe = Fraction(1, 1000), True
            container.mux(packet)
    return buffer.getvalue()


MEDIA = {
    "damaged AVIF": ("image", AVIF, "not a readable image (RuntimeError: Failed to decode"),
    "bomb": ("image", png_of(13_000, 13_000), "13000 x 13000 pixels; at most 100,000,000 are decoded. Scale it down"),
    "boxes in boxes": ("video", boxes(1000), "not a readable video"),
    "cut in a 64-bit size": ("video", b"\0\0\0\x10ftypisom\0\0\0\0\0\0\0\1moov\0\0\0\0", "not a readable video"),
    "growing video": ("video", growing(), "frame 3 is 96 x 96 pixels, but the first is 64 x 64"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", MEDIA)
def test_every_reader_names_a_bad_medium_and_goes_on(tmp_path, name):
    kind, data, reason = MEDIA[name]
    member = f"0.{'png' if kind == 'image' else 'mkv'}"
    (tmp_path / member).write_bytes(data)
    turns = [{"role": "user", "content": f"<{kind}>?"}, {"role": "assistant", "content": "yes"}]
    bad = {"v": 1, "messages": turns, f"{kind}s": [member]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in (bad, *GOOD)))
    report = build_shards(rows, tmp_path / "out", BuildOptions(name="t"))
    if name != "growing video":  # found only by decoding frames, which a build does not do
        assert (report.written, report.rejected) == (len(GOOD), 1)
        (reject,) = (tmp_path / "out/rejects.jsonl").read_text().splitlines()
        assert reason in json.loads(reject)["reason"]
    shard = tmp_path / "in/x.tar"
    write(shard, ("bad.json", json.dumps(bad).encode()), (f"bad.{member}", data))
    assert not set(load_index(shard).problems) - {0}
    (finding,) = audit_shards([shard], AuditOptions())
    assert (finding.key, reason in finding.reason) == ("bad", True), finding
    assert trained_keys(shard) == good_keys()


GOOD = [
    {"v": 1, "messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]}
    for n in range(3)
]


def good_keys():
    return {f"a/x.tar/good{n}" for n in range(len(GOOD))}


def write(shard, *files):
    """Write a shard of these files and the good samples."""
    shard.parent.mkdir()
    with TarWriter(shard) as tar:
        for name, data in files:
            tar.add(name, data)
        for number, row in enumerate(GOOD):
            tar.add(f"good{number}.json", json.dumps(row).encode())


def trained_keys(shard):
    """Return the samples that a run reads."""
    config = DataConfig(packs_per_step=1, tokens_per_pack=384, workers=0, sources={"a": SourceConfig(path=str(shard))})
    stream = open_stream(config, open_corpus(config, renderer()), renderer(), seed=1, rank=0, size=1)
    return {key for step in stream for batch in step.batches for key in batch.keys}


def nested(depth):
    value = {"type": "string"}
    for _ in range(depth):
        value = {"of": value}
    return value


DEEP = {
    "tools": {"tools": [nested(700)]},
    "arguments": {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": nested(900)}]}]},
    "arguments as text": {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[" * 10**5}]}]},
}


@pytest.mark.parametrize("name", DEEP)
def test_every_reader_names_a_record_that_is_nested_too_deep_and_goes_on(tmp_path, name):
    bad = {**GOOD[0], **DEEP[name]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in (bad, *GOOD)))
    report = build_shards(rows, tmp_path / "out", BuildOptions(name="t"))
    assert (report.written, report.rejected) == (len(GOOD), 1)
    shard = tmp_path / "in/x.tar"
    write(shard, ("bad.json", json.dumps(bad).encode()))
    assert "JSON is nested more than 100 deep; flatten it" in load_index(shard).problems[0]
    assert [finding.key for finding in audit_shards([shard], AuditOptions(renderer=renderer()))] == ["bad"]
    assert trained_keys(shard) == good_keys()


def test_a_record_nested_less_deeply_is_rendered(tmp_path):
    shard = tmp_path / "in/x.tar"
    write(shard, ("deep.json", json.dumps({**GOOD[0], "tools": [nested(97)]}).encode()))
    assert not load_index(shard).problems
    assert not list(audit_shards([shard], AuditOptions(renderer=renderer())))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_a_tiff_in_a_mode_that_png_lacks_is_kept_with_the_pixels_of_training(tmp_path, mode):
    data = encode(Image.fromarray(picture(24, 40)).convert(mode), "TIFF")
    (tmp_path / "0.tif").write_bytes(data)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({**GOOD[0], "images": ["0.tif"]}) + "\n")
    (shard,) = build_shards(rows, tmp_path / "out", BuildOptions(name="t")).shards
    _, members = SampleReader().sample(shard, 0)
    kept, asked = (decode_image(each, name="x") for each in (members["0.png"], data))
    assert (kept == asked).all()
