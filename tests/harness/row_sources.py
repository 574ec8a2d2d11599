"""A source of each of the 24 rows of the table in docs/data-format.md."""

import gzip

import zstandard
from row_files import (
    JPG,
    MP4,
    PNG,
    QA,
    json_bytes,
    row_of_docs,
    write_csv,
    write_datasets,
    write_energon,
    write_lines,
    write_packed,
    write_pdf,
    write_table,
    write_tar,
    write_zip,
)

SNIPPETS = {
    "01": "OpenAI messages",
    "02": "ShareGPT",
    "03": "LLaVA JSON",
    "04": "ms-swift messages",
    "05": "TRL",
    "06": "Alpaca",
    "07": "query, response",
    "08": "question, answer",
    "09": "Qwen-VL",
    "10": "interleaved parts",
    "11-video": "LLaVA-Video",
    "11-span": "time spans",
    "11-moments": "moments",
    "17": "Cauldron, FineVision",
    "20": "agent trajectory",
    "21": "OBELICS",
}


def write_sources(folder):
    """Write the files, and return the sources of a recipe by the number of their row."""
    folder.mkdir()
    for name, data in {"a.png": PNG, "b.jpg": JPG, "v.mp4": MP4}.items():
        (folder / name).write_bytes(data)
    asked = {**QA, "image": "a.png"}
    paths = {number: write_lines(folder / f"{number}.jsonl", [row_of_docs(name)]) for number, name in SNIPPETS.items()}
    paths["12-csv"] = write_csv(folder / "12.csv", [asked])
    paths["12-tsv"] = write_csv(folder / "12.tsv", [asked])
    paths["13-gz"] = write_packed(folder / "13.jsonl.gz", gzip.compress)
    paths["13-zst"] = write_packed(folder / "13.jsonl.zst", zstandard.ZstdCompressor().compress)
    paths["14"] = write_table(folder / "14.parquet", [{**QA, "image": {"bytes": PNG, "path": None}}])
    write_datasets(folder / "15", splits=True)
    paths["15"] = folder / "15"
    (folder / "16/part").mkdir(parents=True)
    write_table(folder / "16/part/train-00000-of-00001.parquet", [{**QA, "image": PNG}])
    paths["16"] = folder / "16"
    table = "file_name,question,answer\na.png,What is it?,A horse.\n"
    paths["18"] = write_zip(folder / "18.zip", "metadata.csv", table, {"a.png": PNG})
    write_pdf(folder / "f.pdf", ["red"])
    paths["19"] = write_lines(folder / "19.jsonl", [{**QA, "image": "f.pdf#page=1"}])
    paths["22"] = write_tar(folder / "laion.tar", [{"jpg": JPG, "txt": b"A horse."}])
    notes = "__class__: CaptioningWebdataset\nfield_map: {image: jpg, caption: txt}\n"
    paths["23"] = write_energon(folder / "23", notes)
    paths["24"] = write_tar(
        folder / "24.tar", [{"left.jpg": JPG, "right.jpg": JPG, "json": json_bytes({"q": "Same?"})}]
    )
    sources = {number: {"path": str(path)} for number, path in paths.items()}
    sources["18"]["map"] = {"image": "file_name"}
    sources["24"]["map"] = {"images": ["left.jpg", "right.jpg"], "question": "json.q", "answer": "json.q"}
    return sources
