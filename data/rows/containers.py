"""Reads the rows of one file, a few at a time: JSON, JSON Lines, CSV, TSV, parquet, arrow, and zip with a table."""

import csv
import gzip
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

from data.format.record import load_json
from data.rows.extras import load_extra
from data.rows.json_list import MAX_ROW, read_list

Rows = Iterator[tuple[int, Any]]
_BLOCK = 1 << 20
_BATCH = 32
"""Rows of a table that are in memory together."""
PACKED = (".gz", ".zst")
_ARROW_FILE = b"ARROW1"


def kind_of(path: Path) -> str:
    """Return the ending that says how a file is read, without the packing: .jsonl for rows.jsonl.gz."""
    name = path.name.lower()
    for packing in PACKED:
        name = name.removesuffix(packing)
    return Path(name).suffix


def read_rows(path: Path) -> Rows:
    """Yield number (from 1) and row of a file; a single row that cannot be read is a ValueError."""
    kind = kind_of(path)
    if kind not in READERS:
        raise ValueError(
            f"{path} is not a file of rows; those end with {', '.join(READERS)} (text also with .gz or .zst)"
        )
    try:
        with _open(path) as file:
            yield from READERS[kind](file, path)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def origin_of(path: Path) -> Path:
    """Return the folder in which relative paths of a file's rows begin; for a zip, a folder inside it."""
    return (path / _table(path)).parent if kind_of(path) == ".zip" else path.parent


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]  # it reads as a binary file
    if path.name.lower().endswith(".zst"):
        return io.BufferedReader(_Unpacked(path), buffer_size=_BLOCK)
    return path.open("rb")


class _Unpacked(io.RawIOBase):
    """The content of a .zst file; a damaged one is an OSError, as with gzip."""

    def __init__(self, path: Path) -> None:
        self._zstandard = load_extra("zstandard", str(path))
        self._file = path.open("rb")
        self._reader = self._zstandard.ZstdDecompressor().stream_reader(self._file, read_across_frames=True)

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer."""
        try:
            count: int = self._reader.readinto(buffer)
        except self._zstandard.ZstdError as error:
            raise OSError(f"damaged: {error}") from error
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def _lines(file: BinaryIO, path: Path) -> Rows:
    number = 0
    while line := file.readline(MAX_ROW):
        number += 1
        if len(line) == MAX_ROW and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_ROW)) and not rest.endswith(b"\n"):
                pass
            yield number, ValueError(f"is longer than {MAX_ROW:,} bytes")
        elif line.strip():
            try:
                yield number, load_json(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            except ValueError as error:
                yield number, error


def _list(file: BinaryIO, path: Path) -> Rows:
    rows = enumerate(read_list(file), 1)
    while True:
        try:
            item = next(rows, None)
        except ValueError as error:
            hint = "write a list of rows, or one row per line in a .jsonl file"
            raise ValueError(f"{path} is not a list of JSON rows: {error}; {hint}") from error
        if item is None:
            return
        yield item


def _separated(file: BinaryIO, path: Path) -> Rows:
    csv.field_size_limit(MAX_ROW)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        table = csv.DictReader(text, delimiter="\t" if kind_of(path) == ".tsv" else ",", restkey="")
        for number, row in enumerate(table, 1):
            if isinstance(row.get(""), list):
                head = ", ".join(table.fieldnames or ())
                yield number, ValueError(f"has more cells than the head, which has {head}")
            else:
                yield number, {name: cell for name, cell in row.items() if cell not in ("", None)}
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no table of text: {error}") from error
    finally:
        text.detach()  # whoever opened the file closes it


def _parquet(file: BinaryIO, path: Path) -> Rows:
    arrow = load_extra("pyarrow", str(path))
    parquet = load_extra("pyarrow.parquet", str(path))
    try:
        # page by page: else a column of images is read as a whole, group of rows by group
        table = parquet.ParquetFile(file, pre_buffer=False, buffer_size=_BLOCK)
        batches = table.iter_batches(batch_size=_BATCH)
        yield from _batched(batches)
    except arrow.ArrowException as error:
        raise ValueError(f"{path} is no parquet file: {error}") from error


def _arrow(file: BinaryIO, path: Path) -> Rows:
    """Read both forms: the stream, as `datasets` writes it, and the file."""
    arrow = load_extra("pyarrow", str(path))
    is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
    file.seek(0)
    try:
        if is_file:
            opened = arrow.ipc.open_file(file)
            yield from _batched(opened.get_batch(at) for at in range(opened.num_record_batches))
        else:
            yield from _batched(arrow.ipc.open_stream(file))
    except arrow.ArrowException as error:
        raise ValueError(f"{path} is no arrow file: {error}") from error


def _batched(batches: Iterator[Any]) -> Rows:
    number = 0
    for batch in batches:
        for first in range(0, batch.num_rows, _BATCH):
            for row in batch.slice(first, _BATCH).to_pylist():
                number += 1
                yield number, row


def _zip(file: BinaryIO, path: Path) -> Rows:
    table = Path(_table(path))
    with zipfile.ZipFile(file) as archive, archive.open(str(table)) as inner:
        yield from READERS[kind_of(table)](inner, table)  # type: ignore[arg-type]  # it reads as a binary file


def _table(path: Path) -> str:
    """Return the name of the one table in a zip."""
    try:
        with closing(zipfile.ZipFile(path)) as archive:
            names = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no zip: {error}") from error
    tables = [name for name in names if Path(name).suffix.lower() in READERS and not name.lower().endswith(".zip")]
    if len(tables) != 1:
        found = f"several tables ({', '.join(tables[:5])})" if tables else "no table"
        raise ValueError(
            f"{path} contains {found}; it needs one .csv, .tsv, .jsonl, .json or .parquet that names its images. Keep "
            f"one, or put the table beside the zip and name images as {path.name}/name.jpg"
        )
    return tables[0]


READERS: dict[str, Callable[[BinaryIO, Path], Rows]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _list,
    ".csv": _separated,
    ".tsv": _separated,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".zip": _zip,
}


def count_rows(path: Path) -> int:
    """Count the rows of a file where that is quick; 0 where it is not."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    if path.suffix == ".parquet":
        rows: int = load_extra("pyarrow.parquet", str(path)).ParquetFile(path).metadata.num_rows
        return rows
    return 0
