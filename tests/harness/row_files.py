"""Media and turns of the tests of rows."""

from media_files import clip, encode, moving, picture
from PIL import Image

PNG = encode(Image.fromarray(picture(64, 96)))
JPG = encode(Image.fromarray(picture(64, 64, 1)), "JPEG")
MP4 = clip(moving(12, 64, 64), rate=6)
QA = {"question": "What is it?", "answer": "A horse."}


def said(record):
    """Return the turns of a record as text: who, whether it is learned, and what."""
    lines = []
    for turn in record.messages:
        text = "".join(item.text or f"<{item.kind}>" for item in turn.contents)
        lines.append(f"{turn.role[0]}{'+' if turn.weight else ''}: {text}")
    return " | ".join(lines)
