"""Every shape of rows in docs/data-format.md, written by the tool that it comes from, read to rendered samples."""

import base64
import gzip
import io
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from corpora import renderer
from PIL import Image
from row_files import (
    DOC,
    JPG,
    MP4,
    PNG,
    QA,
    row_of_docs,
    said,
    write_csv,
    write_datasets,
    write_lines,
    write_packed,
    write_pdf,
    write_table,
    write_zip,
)

from data.format.printable import printable
from data.prepare.build import BuildOptions, build_shards
from data.prepare.recognise import recognise
from data.rows.columns import Columns
from data.rows.containers import READERS
from data.rows.convert import convert_rows
from data.rows.files import RowSource, count_source, is_rows, read_source, row_files, stamp_of_rows
from data.shards.reader import SampleReader
from launchers.cli import main

TEXT = base64.b64encode(PNG).decode()


@pytest.fixture
def media(tmp_path):
    """Return a folder with the files that the rows name."""
    for name, data in {"a.png": PNG, "b.jpg": JPG, "v.mp4": MP4}.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def samples_of(source, folder, **options):
    """Build shards, and return the text and the number of images and videos of every rendered sample."""
    report = build_shards(source, folder, BuildOptions(name="t", **options))
    rejects = (folder / "rejects.jsonl").read_text()
    assert not rejects, rejects
    reader, out = SampleReader(), []
    for shard in report.shards:
        index = reader.index(shard)
        assert not index.problems
        for number, key in enumerate(index.keys):
            record, members = reader.sample(shard, number)
            built = renderer().build(record, *reader.media(record, members, shard.parent), key=key)
            assert built.loss_weights.any()
            out.append((said(record), len(record.images), len(record.videos)))
    return out


ASKED = "u: <image>What is it? | a+: A horse."
SNIPPETS = {
    "OpenAI messages": ("OpenAI messages", [(ASKED, 1, 0)]),
    "ShareGPT": ("ShareGPT", [("u: Hello? | a+: Hello.", 0, 0)]),
    "LLaVA JSON": ("LLaVA", [(ASKED, 1, 0)]),
    "ms-swift messages": ("messages", [(ASKED, 1, 0)]),
    "TRL": ("prompt and completion", [("u: <image>What is it? | a+: A horse.", 1, 0)]),
    "Alpaca": ("Alpaca", [("u: Translate.\nHallo | a+: Hello", 0, 0)]),
    "query, response": (
        "query and response",
        [("u: Hello? | a+: Hello. | u: <image>What is it? | a+: A horse.", 1, 0)],
    ),
    "question, answer": ("question and answer", [(ASKED, 1, 0)]),
    "Qwen-VL": ("Qwen-VL", [("u: Picture 1: <image>\nWhere is it? | a+: <ref><bbox>", 1, 0)]),
    "interleaved parts": ("interleaved parts", [("a+: Spring: <image> and autumn: <image>", 2, 0)]),
    "LLaVA-Video": ("LLaVA", [("u: <video>\nWhat happens? | a+: It slides.", 0, 1)]),
    "time spans": ("captions", [("u: <video> | a+: It slides.", 0, 1)]),
    "moments": (
        "moments of a video",
        [("u: <video> | a+: 0.0 - 1.0 seconds: It starts.\n1.0 - 2.0 seconds: It stops.", 0, 1)],
    ),
    "agent trajectory": (
        "agent trajectory",
        [
            ("u: Open the shop.\n<image> | a+: click(3)", 1, 0),
            ("u: Open the shop.\n<image> | a: click(3) | u: <image> | a+: done()", 2, 0),
        ],
    ),
    "Cauldron, FineVision": (
        "Cauldron",
        [("u: <image><image>Same? | a+: No. | u: Why? | a+: One is square.", 2, 0)],
    ),
    "OBELICS": ("OBELICS", [("a+: <image>The valley.<image>", 2, 0)]),
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_the_snippet_of_each_shape_is_recognised_and_rendered(name, media):
    shape, expected = SNIPPETS[name]
    source = write_lines(media / "rows.jsonl", [row_of_docs(name)])
    assert recognise(RowSource(path=source)).startswith(f"{shape} (columns ")
    assert samples_of(source, media / "out") == expected


def test_the_table_of_shapes_is_complete():
    rows = re.findall(r"^\| (\d+) \| ", DOC, re.MULTILINE)
    assert [int(number) for number in rows] == list(range(1, 25))


TABLES = {
    "csv": lambda folder: write_csv(folder / "r.csv", [{**QA, "image": "a.png"}] * 2),
    "tsv with base64": lambda folder: write_csv(folder / "r.tsv", [{"index": 1, **QA, "image": TEXT}] * 2),
    "gz": lambda folder: write_packed(folder / "r.jsonl.gz", gzip.compress),
    "zst": lambda folder: write_packed(folder / "r.jsonl.zst", zstandard.ZstdCompressor().compress),
    "parquet of bytes": lambda folder: write_table(folder / "r.parquet", [{**QA, "image": PNG}] * 2),
    "parquet of cells": lambda folder: write_table(
        folder / "r.parquet", [{**QA, "image": {"bytes": PNG, "path": "x.png"}}] * 2
    ),
    "zip": lambda folder: write_zip(
        folder / "r.zip",
        "set/metadata.csv",
        "file_name,question,answer\na.png,What is it?,A horse.\n" + "sub/b.png,What is it?,A horse.\n",
        {"set/a.png": PNG, "set/sub/b.png": PNG},
    ),
    "table beside a zip": lambda folder: (
        write_zip(folder / "i.zip", "note.txt", "", {"x/a.png": PNG}),
        write_lines(folder / "r.jsonl", [{**QA, "image": "i.zip/x/a.png"}] * 2),
    )[1],
}


@pytest.mark.parametrize("kind", TABLES)
def test_each_kind_of_file_gives_the_same_samples(kind, media):
    source = TABLES[kind](media)
    assert is_rows(str(source))
    columns = Columns.of({"image": "file_name"}) if kind == "zip" else Columns()
    assert samples_of(source, media / "out", map=columns.text) == [(ASKED, 1, 0)] * 2


def test_pages_of_a_pdf_are_images_at_a_resolution(media):
    write_pdf(media / "f.pdf", ["red", "blue"])
    rows = [{**QA, "image": "f.pdf#page=2"}, {**QA, "image": "f.pdf#page=1&dpi=72"}]
    source = write_lines(media / "rows.jsonl", rows)
    assert samples_of(source, media / "out", media="reference") == [(ASKED, 1, 0)] * 2
    reader = SampleReader()
    pages = [Image.open(io.BytesIO(reader.sample(media / "out/t-000000.tar", n)[1]["0.png"])) for n in (0, 1)]
    assert [page.size for page in pages] == [(209, 292), (100, 140)]
    assert [page.convert("RGB").getpixel((50, 50)) for page in pages] == [(0, 0, 255), (255, 0, 0)]


def test_folders_of_datasets_are_read_by_split(media):
    write_datasets(media / "one", splits=False)
    write_datasets(media / "two", splits=True)
    assert samples_of(media / "one", media / "out1") == [(ASKED, 1, 0)] * 2
    assert samples_of(media / "two", media / "out2") == [(ASKED, 1, 0)] * 2
    assert samples_of(media / "two", media / "out3", split="test") == [(ASKED.replace("horse", "cow"), 1, 0)]
    with pytest.raises(ValueError, match=r"two has no split 'tests'; did you mean test\? \(known: train, test\)"):
        row_files(RowSource(path=media / "two", split="tests"))
    (arrow,) = row_files(RowSource(path=media / "one"))
    (media / "two/train/state.json").write_text('{"_data_files": [{"filename": "../../one/state.json"}]}')
    with pytest.raises(ValueError, match=r"train names the file '../../one/state.json', which leads out of it"):
        row_files(RowSource(path=media / "two"))
    (media / "two/train/state.json").write_text('{"_data_files": 3}')
    with pytest.raises(ValueError, match="state.json has no list '_data_files'; it is not what `datasets` saves"):
        row_files(RowSource(path=media / "two"))
    assert samples_of(arrow, media / "out4") == [(ASKED, 1, 0)] * 2, "one arrow file, as a stream"
    table = pyarrow.Table.from_pylist([{**QA, "image": PNG}] * 2)
    with pyarrow.OSFile(str(media / "f.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert samples_of(media / "f.arrow", media / "out5") == [(ASKED, 1, 0)] * 2, "one arrow file, with a footer"


def test_hub_folders_are_read_by_config_and_split(tmp_path):
    hub = tmp_path / "hub"
    for place in ("ai2d/train-00000-of-00002", "ai2d/train-00001-of-00002", "ai2d/val-00000", "chart/train-00000"):
        (hub / place).parent.mkdir(parents=True, exist_ok=True)
        write_table(hub / f"{place}.parquet", [{**QA, "answer": place}])
    (hub / "README.md").write_text("---\nlicense: mit\n---\nA set.\n")

    def answers(**options):
        return [row["answer"] for _, row, _ in read_source(RowSource(path=hub, **options))]

    with pytest.raises(ValueError, match="hub has several configs; choose one with `config`: ai2d, chart"):
        answers()
    with pytest.raises(ValueError, match=r"hub has no config 'charts'; did you mean chart\?"):
        answers(config="charts")
    assert answers(config="ai2d") == ["ai2d/train-00000-of-00002", "ai2d/train-00001-of-00002"]
    assert answers(config="ai2d", split="validation") == answers(config="ai2d", split="val") == ["ai2d/val-00000"]
    assert count_source(RowSource(path=hub, config="ai2d")) == 2
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: ai2d/train-*.parquet\n"
    card += "  - split: odd\n    path: [chart/*.parquet]\n- config_name: other\n  data_files: ai2d/val*\n---\n"
    (hub / "README.md").write_text(card)
    assert answers() == ["ai2d/train-00000-of-00002", "ai2d/train-00001-of-00002"]
    assert answers(split="odd") == ["chart/train-00000"]
    assert answers(config="other") == ["ai2d/val-00000"]
    (hub / "README.md").write_text(card.replace("[chart/*.parquet]", "../*.parquet"))
    with pytest.raises(ValueError, match=r"hub names the file '\.\./\*\.parquet', which leads out of it"):
        answers(split="odd")
    (hub / "README.md").write_text("---\nconfigs: [{config_name: x, data_files: [{split: 3}]}]\n---\n")
    with pytest.raises(ValueError, match="README.md, config x: data_files are .*write patterns of files by split"):
        answers()
    (hub / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(ValueError, match="README.md begins with a head that is not YAML"):
        answers()


def test_map_names_columns_and_keys_inside_them(media):
    rows = [{"q": "What is it?", "meta": {"said": "A horse."}, "left": "a.png", "right": "b.jpg", "note": 1}]
    source = write_lines(media / "rows.jsonl", rows)
    words = ["--map", "question=q", "--map", "answer=meta.said", "--map", "images=left,right"]
    assert main(["shards", "build", str(source), "--out", str(media / "out"), *words]) == 0
    (shard,) = (media / "out").glob("*.tar")
    assert said(SampleReader().record(shard, 0)) == "u: <image><image>What is it? | a+: A horse."
    with pytest.raises(ValueError, match="maps to 'questions', which nothing reads; did you mean question?"):
        Columns.of({"questions": "q"})
    with pytest.raises(ValueError, match="maps question to 3; write the name of a column"):
        Columns.of({"question": 3})
    with pytest.raises(ValueError, match=r"`map` names the column 'lefd', which the first rows do not have; did"):
        recognise(RowSource(path=source, columns=Columns.of({"image": "lefd"})))


def test_a_build_says_what_it_recognised(media, capsys):
    source = write_lines(media / "rows.jsonl", [row_of_docs("Cauldron, FineVision")] * 3)
    assert main(["shards", "build", str(source), "--out", str(media / "out")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("rows.jsonl: 3 rows, recognised as Cauldron (columns images, texts)\n3 samples in 1 shard")


def test_an_unknown_shape_gets_the_known_ones_and_the_nearest(tmp_path, capsys):
    source = write_lines(tmp_path / "rows.jsonl", [{"instructions": "x", "output": "y", "n": 1}])
    assert main(["shards", "build", str(source), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "columns instructions, n, output, which is no known shape. The nearest is Alpaca, which needs" in error
    assert "Known shapes: OpenAI messages (" in error
    assert "captions (image or video, and text or caption)" in error
    assert not (tmp_path / "out").exists()


REFUSED = {
    "audio": ({"messages": [], "audios": ["x.wav"]}, "audios is audio, which this model cannot hear"),
    "audio part": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        r"messages\[0\].content\[0\] is audio, which this model cannot hear",
    ),
    "pairs": ({"prompt": "x", "chosen": "y", "rejected": "z"}, "chosen belongs to a pair of a better and a worse"),
    "ms-swift pairs": ({"messages": [], "rejected_response": "z"}, "rejected_response belongs to a pair"),
    "KTO": ({"prompt": "x", "completion": "y", "label": True}, "label says whether the completion is liked"),
    "MMC4": (
        {"text_list": ["x"], "image_info": [{"image_name": "a", "matched_text_index": 0}]},
        r"image_info\[0\] has no image_base64: MMC4 is published without its images",
    ),
    "no pairs": ({"images": [None], "texts": [None]}, r"texts\[0\] and images\[0\] must be a text or an image"),
    "lists": ({"images": [None, "x"], "texts": ["x"]}, "images has 2 entries for 1 of texts"),
    "text": ({"images": [None], "texts": [3]}, r"texts\[0\] is 3; write text"),
    "cauldron": ({"images": ["a"], "texts": [{"user": "x"}]}, "assistant is missing"),
    "cauldron turn": ({"images": ["a"], "texts": [{"user": "x", "assistant": "y"}, 3]}, r"texts\[1\] is 3"),
    "answers": ({"question": "x", "answers": [3]}, r"answers is \[3\]; write a list of texts"),
    "answer": ({"question": "x", "answer": 3}, "answer is 3; write text"),
    "caption": ({"image": "a", "text": " "}, "text is ' '; write text"),
    "part": ({"content": [3]}, r"parts\[0\] is 3; write text, or an object"),
    "spans": ({"video": "v", "start": "x", "end": 2, "text": "y"}, r"start is \['x', 2\]; write \[start, end\]"),
    "moments": ({"video": "v", "timestamps": [[0, 1]], "sentences": []}, "timestamps must be a list with"),
    "window": ({"goal": "x", "steps": [{"screen": "a", "action": "b"}], "past_screens": -1}, "past_screens is -1"),
    "step": ({"goal": "x", "steps": [{"screen": "a", "action": "b"}, {}]}, r"steps\[1\] is {}; write an object"),
    "actions": ({"goal": "x", "screens": ["a", "b", "c"], "actions": ["d"]}, "actions has 1 entries for 3 screens"),
    "turn of Qwen-VL": ({"conversations": [{"value": "<img>a</img>"}, 3]}, r"conversations\[1\] is 3"),
    "sentence": ({"text_list": [], "image_info": [{"image_base64": "x"}]}, "image_info matches sentence None of 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_cannot_be_honoured_are_refused_with_the_reason(name):
    row, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        convert_rows(row)


def test_media_that_cannot_be_read_are_refused_with_the_reason(media):
    write_pdf(media / "f.pdf", ["red"])
    (media / "bad.pdf").write_bytes(b"%PDF-1.4 rubbish")
    write_zip(media / "i.zip", "note.txt", "", {"a.png": PNG})
    dicom = base64.b64encode(bytes(128) + b"DICM" + bytes(100)).decode()
    rows = {
        "f.pdf": "is the file f.pdf; name one of its pages: f.pdf#page=1",
        "f.pdf#page=2": "names page 2 of a PDF with 1",
        "f.pdf#page=1&dpi=5000": "10 to 1200 dots per inch",
        "bad.pdf#page=1": "is a PDF that cannot be opened",
        "x.dcm": "is a DICOM file: its pixels need a window",
        f"data:application/dicom;base64,{dicom}": "is a DICOM file",
        "i.zip/../a.png": "contains no ../a.png",
        "i.zip/b.png": "i.zip contains no b.png",
    }
    source = write_lines(media / "rows.jsonl", [{**QA, "image": place} for place in rows])
    report = build_shards(source, media / "out", BuildOptions(name="t"))
    reasons = [json.loads(line)["reason"] for line in (media / "out/rejects.jsonl").read_text().splitlines()]
    assert report.written == 0
    for reason, expected in zip(reasons, rows.values(), strict=True):
        assert expected in reason


def test_rows_in_a_zip_name_members_of_it_and_nothing_else(media):
    for place in ("../a.png", str(media / "a.png"), "/a.png"):
        table = json.dumps({**QA, "image": place})
        source = write_zip(media / "r.zip", "rows.jsonl", table, {"b.png": PNG})
        report = build_shards(source, media / f"out{len(place)}", BuildOptions(name="t"))
        assert (report.written, report.rejected) == (0, 1)


def test_damaged_and_ambiguous_files_are_named(tmp_path):
    def message(name, data, **options):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=r"\w") as error:
            list(read_source(RowSource(path=tmp_path / name, **options)))
        return printable(str(error.value))

    assert "r.gz" not in message("r.jsonl.gz", b"no gzip")
    assert "cannot read" in message("r.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-12])
    assert "damaged" in message("r.jsonl.zst", b"no zstd at all")
    assert "is no parquet file" in message("r.parquet", b"x" * 99)
    assert "is no arrow file" in message("r.arrow", b"x" * 99)
    assert "is no table of text" in message("r.csv", b"a,b\n\xff,2\n")
    assert "is no zip" in message("r.zip", b"x")
    assert "is not a file of rows; those end with .jsonl" in message("r.xml", b"x")
    assert "followed by '}'" in message("r.json", b"[1 }")
    assert "the list is followed by '3'" in message("r.json", b"[1] 3")
    assert "config and split do not apply" in message("r.json", b"[1]", split="test")
    write_zip(tmp_path / "two.zip", "a.csv", "a\n1\n", {"b.csv": b"a\n1\n"})
    with pytest.raises(ValueError, match=r"two.zip contains several tables \(a.csv, b.csv\)"):
        list(read_source(RowSource(path=tmp_path / "two.zip")))
    write_zip(tmp_path / "none.zip", "a.txt", "", {})
    with pytest.raises(ValueError, match="none.zip contains no table"):
        list(read_source(RowSource(path=tmp_path / "none.zip")))
    (tmp_path / "r.csv").write_text("a,b\n1,2,3\n4,5\n")
    (_, wide, _), (_, row, _) = read_source(RowSource(path=tmp_path / "r.csv"))
    assert "has more cells than the head, which has a, b" in str(wide)
    assert row == {"a": "4", "b": "5"}


def test_a_list_is_read_in_windows(tmp_path, monkeypatch):
    rows = [{"n": number, "text": "ä" * number, "deep": [[{}]] * 3} for number in range(300)]
    for text in (json.dumps(rows), json.dumps(rows, indent=1), json.dumps(rows, ensure_ascii=False), "[ ]", "[12, 3]"):
        for block in (1, 7, 1 << 20):
            monkeypatch.setattr("data.rows.json_list._BLOCK", block)
            (tmp_path / "r.json").write_text(text)
            read = [row for _, row, _ in read_source(RowSource(path=tmp_path / "r.json"))]
            assert read == json.loads(text)
    monkeypatch.setattr("data.rows.json_list.MAX_ROW", 1000)
    monkeypatch.setattr("data.rows.json_list._BLOCK", 100)
    (tmp_path / "r.json").write_text(json.dumps(["x" * 5000]))
    with pytest.raises(ValueError, match="an entry has more than 1,000 characters"):
        list(read_source(RowSource(path=tmp_path / "r.json")))


class Watched(io.FileIO):
    """A file that remembers the most bytes that were read at once."""

    most = 0

    def read(self, size=-1):
        data = super().read(size)
        self.most = max(self.most, len(data))
        return data


def test_a_parquet_file_is_read_page_by_page(tmp_path):
    rows = [{"n": number, "image": bytes([number]) * 200_000} for number in range(60)]
    path = tmp_path / "r.parquet"
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, write_batch_size=8, compression="none", use_dictionary=False)
    assert path.stat().st_size > 60 * 200_000, "one group of rows"
    with Watched(path) as file:
        assert [row for _, row in READERS[".parquet"](file, path)] == rows
        assert file.most < 4_000_000


def test_a_changed_file_of_a_folder_changes_the_stamp(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("train-0.csv", "train-1.csv", "test.csv"):
        (tmp_path / "set" / name).write_text("a\n1\n")
    source = RowSource(path=tmp_path / "set")
    stamp = stamp_of_rows(source)
    (tmp_path / "set/test.csv").write_text("a\n2\n")
    assert stamp_of_rows(source) == stamp, "the other split"
    (tmp_path / "set/train-1.csv").write_text("a\n2\n")
    assert stamp_of_rows(source) != stamp


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "r.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"r.parquet needs pyarrow, .*: pip install 'moetune\[data\]'"):
        list(read_source(RowSource(path=Path(tmp_path / "r.parquet"))))
