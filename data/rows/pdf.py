"""Pages of a PDF as images: `report.pdf#page=3`, or `report.pdf#page=3&dpi=200`."""

import io
import re
from typing import Any

from data.format.fields import BadField
from data.rows.extras import load_extra

DPI = 150
"""Dots per inch of a page: a sheet of A4 becomes 1240 x 1754 pixels."""
_MOST_PIXELS = 100_000_000
_PAGE = re.compile(r"(.*\.pdf)(?:#page=(\d+)(?:&dpi=(\d+))?)?", re.IGNORECASE)


def page_of(place: dict[str, Any], where: str) -> tuple[dict[str, Any], int, int] | None:
    """Return the place of the file, the page and the dots per inch; None if the place is no PDF."""
    kind = "path" if "path" in place else "url"
    found = _PAGE.fullmatch(str(place.get(kind, "")))
    if found is None or "bytes" in place:
        return None
    if not found[2]:
        raise BadField(where, f"is the file {place[kind]}; name one of its pages: {place[kind]}#page=1")
    dpi = int(found[3] or DPI)
    if not 10 <= dpi <= 1200 or len(found[2]) > 9:
        raise BadField(where, f"is {place[kind]!r:.80}; write a page, and 10 to 1200 dots per inch")
    return {**place, kind: found[1]}, int(found[2]), dpi


def page_image(data: bytes, page: int, dpi: int, where: str) -> bytes:
    """Return a page as a PNG; BadField if the file is damaged, needs a password, or has no such page."""
    pdfium = load_extra("pypdfium2", f"{where}: a page of a PDF")
    try:
        document = pdfium.PdfDocument(data)
    except pdfium.PdfiumError as error:
        raise BadField(where, f"is a PDF that cannot be opened: {error}") from error
    try:
        if not 1 <= page <= len(document):
            raise BadField(where, f"names page {page} of a PDF with {len(document)}; pages count from 1")
        leaf = document[page - 1]
        width, height = (side * dpi / 72 for side in leaf.get_size())
        if width * height > _MOST_PIXELS:
            raise BadField(where, f"is a page of {width:.0f} x {height:.0f} pixels at {dpi} dots per inch; lower dpi")
        out = io.BytesIO()
        leaf.render(scale=dpi / 72).to_pil().save(out, "PNG")
    finally:
        document.close()
    return out.getvalue()
