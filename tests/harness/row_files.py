"""Files of rows and foreign tars as other tools write them, and what records of them say."""

import csv
import json
import re
import shutil
import zipfile

import datasets
import pyarrow
import pyarrow.parquet
import pypdfium2
import webdataset
from media_files import clip, encode, moving, picture
from PIL import Image
from places import ROOT

PNG = encode(Image.fromarray(picture(64, 96)))
JPG = encode(Image.fromarray(picture(64, 64, 1)), "JPEG")
MP4 = clip(moving(12, 64, 64), rate=6)
DOC = (ROOT / "docs/data-format.md").read_text()
QA = {"question": "What is it?", "answer": "A horse."}


def said(record):
    """Return the turns of a record as text: who, whether it is learned, and what."""
    lines = []
    for turn in record.messages:
        text = "".join(item.text or f"<{item.kind}>" for item in turn.contents)
        lines.append(f"{turn.role[0]}{'+' if turn.weight else ''}: {text}")
    return " | ".join(lines)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row_of_docs(name):
    """Return the snippet of a shape from the table of docs/data-format.md."""
    found = re.search(rf"^\| \d* ?\| {re.escape(name)} \|.*?`(\{{.*\}})` \|$", DOC, re.MULTILINE)
    assert found, f"docs/data-format.md has no row {name!r} with a snippet"
    return json.loads(found[1])


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writeheader()
        table.writerows(rows)
    return path


def write_table(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def write_zip(path, table, text, images):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(table, text)
        for name, data in images.items():
            archive.writestr(name, data)
    return path


def write_pdf(path, colours):
    """Write a page of one colour each."""
    pages = [Image.new("RGB", (100, 140), colour) for colour in colours]
    document = pypdfium2.PdfDocument.new()
    for page in pages:
        bitmap = pypdfium2.PdfBitmap.from_pil(page)
        picture_of_page = pypdfium2.PdfImage.new(document)
        picture_of_page.set_bitmap(bitmap)
        picture_of_page.set_matrix(pypdfium2.PdfMatrix().scale(100, 140))
        leaf = document.new_page(100, 140)
        leaf.insert_obj(picture_of_page)
        leaf.gen_content()
    document.save(path)
    return path


def write_packed(path, pack):
    line = json.dumps({**QA, "image": "a.png"}).encode() + b"\n"
    path.write_bytes(pack(line) + pack(line))  # two frames, as appending makes them
    return path


def write_datasets(folder, *, splits):
    """Write a folder by `datasets`, with images as its own feature."""
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )

    def made(answers):
        rows = [{**QA, "answer": answer, "image": {"bytes": PNG, "path": None}} for answer in answers]
        table = datasets.table.InMemoryTable(pyarrow.Table.from_pylist(rows, schema=features.arrow_schema))
        return datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint="made here")

    if not splits:
        made(["A horse.", "A horse."]).save_to_disk(folder)
        return
    splits = {"train": made(["A horse.", "A horse."]), "test": made(["A cow."])}
    datasets.DatasetDict(splits).save_to_disk(folder)


def write_tar(path, samples, **options):
    """Write samples by webdataset's own writer; each is a dict of members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False, mtime=0, **options) as tar:
        for number, members in enumerate(samples):
            tar.write({"__key__": f"{number:05d}", **members})
    return path


def json_bytes(value):
    return json.dumps(value).encode()


def write_energon(folder, notes, split=None):
    write_tar(folder / "shards/a.tar", [{"jpg": JPG, "txt": b"A horse.", "json": json_bytes(QA)}])
    shutil.copy(folder / "shards/a.tar", folder / "shards/b.tar")
    (folder / ".nv-meta").mkdir()
    (folder / ".nv-meta/dataset.yaml").write_text(notes)
    split = split or {"split_parts": {"train": ["shards/{a..a}.tar"], "val": ["shards/b.tar"]}, "exclude": []}
    (folder / ".nv-meta/split.yaml").write_text(json.dumps(split).replace("{a..a}", "{a,b}"))
    return folder


CAPTIONING = (
    "__module__: megatron.energon\n__class__: CaptioningWebdataset\nfield_map: {image: 'png,jpg', caption: txt}\n"
)
