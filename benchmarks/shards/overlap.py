"""`overlap`: the share of copies, crops, re-encodings and rewordings that `moetune shards overlap` finds."""

import io
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.gpu.material import photographs
from benchmarks.harness.figure import Figure, at_least, exactly
from data.format.tar import TarWriter
from data.prepare.overlap import find_overlap

Item = str | Image.Image
Change = Callable[[Item, np.random.Generator], Item]

_ITEMS = 48  # of a kind: a half is on both sides, a quarter on one side only


def run() -> Iterator[Figure]:
    """Yield, for each kind of item and change, the share found; then the number of matches that are wrong."""
    wrong = 0
    for kind, (draw, changes) in _KINDS.items():
        items = draw(np.random.default_rng(7))
        for name, (change, floor) in changes.items():
            recall, mistakes = _found(items, change)
            wrong += mistakes
            target = None if floor is None else at_least(floor)
            config = {"items": len(items), "on both sides": len(items) // 2}
            yield Figure(f"{kind}, {name}", recall, "found", config=config, better="higher", target=target)
    yield Figure("matches of different items", wrong, "matches", config={"kinds": list(_KINDS)}, target=exactly(0))


def _found(items: Sequence[Item], change: Change) -> tuple[float, int]:
    """Return the share of the items on both sides that match, and the number of other matches."""
    half, rng = len(items) // 2, np.random.default_rng(11)
    train = {f"t{number}": item for number, item in enumerate(items[: half * 3 // 2])}
    evaluation = {f"e{number}": change(item, rng) for number, item in enumerate(items[:half])}
    evaluation |= {f"new{number}": item for number, item in enumerate(items[half * 3 // 2 :])}
    with tempfile.TemporaryDirectory() as folder:
        sides = [_write(Path(folder) / name, side) for name, side in (("t.tar", train), ("e.tar", evaluation))]
        report = find_overlap([sides[0]], [sides[1]])
    pairs = [(match.sample.split()[-1], match.found_in.split()[-1]) for match in report.matches]
    right = sum(sample[1:] == source[1:] for sample, source in pairs)
    return right / half, len(pairs) - right


def _write(path: Path, items: Mapping[str, Item]) -> Path:
    with TarWriter(path) as tar:
        for key, item in items.items():
            image = None if isinstance(item, str) else item
            question, answer = ("<image>What is it?", "?") if image else ("Continue.", item)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            record = {"v": 1, "messages": messages, "images": ["0.png"] if image else []}
            tar.add(f"{key}.json", json.dumps(record).encode())
            if image:
                tar.add(f"{key}.0.png", _bytes(image, "PNG"))
    return path


def _bytes(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _texts(rng: np.random.Generator) -> list[Item]:
    words = ["".join(chr(97 + letter) for letter in rng.integers(0, 26, size)) for size in rng.integers(2, 9, 2000)]
    return [" ".join(rng.choice(words, 80)) for _ in range(_ITEMS)]


def _photos(rng: np.random.Generator) -> list[Item]:
    """Cut scikit-learn's two photographs into pieces that do not overlap."""
    cells = [(x, y) for y in range(0, 420, 105) for x in range(0, 636, 106)]
    photos = [Image.open(io.BytesIO(data)) for data in photographs()]
    pieces: list[Item] = [photo.crop((x, y, x + 106, y + 105)) for photo in photos for x, y in cells]
    return [pieces[number] for number in rng.permutation(len(pieces))]


def _drawings(rng: np.random.Generator) -> list[Item]:
    items: list[Item] = []
    for _ in range(_ITEMS):
        image = Image.new("RGB", (200, 150), tuple(rng.integers(0, 255, 3).tolist()))
        pen = ImageDraw.Draw(image)
        for shape in (pen.rectangle, pen.ellipse) * 3:
            (x, y), (w, h) = rng.integers(0, 150, 2), rng.integers(10, 90, 2)
            shape([x, y, x + w, y + h], fill=tuple(rng.integers(0, 255, 3).tolist()))
        items.append(image)
    return items


def _pages(rng: np.random.Generator) -> list[Item]:
    items: list[Item] = []
    for text in _texts(rng):
        image = Image.new("RGB", (300, 400), "white")
        words = str(text).split()
        at = 0
        for line in range(22):
            length = int(rng.integers(1, 8))
            ImageDraw.Draw(image).text((15, 12 + 17 * line), " ".join(words[at : at + length]), fill="black")
            at = (at + length) % 70
        items.append(image)
    return items


def _reworded(item: Item, _: np.random.Generator) -> Item:
    return " ".join(word[::-1] if number % 6 == 5 else word for number, word in enumerate(str(item).split()))


def _of_image(alter: Callable[[Image.Image, np.random.Generator], Image.Image]) -> Change:
    def change(item: Item, rng: np.random.Generator) -> Item:
        assert isinstance(item, Image.Image)
        return alter(item, rng)

    return change


def _crop(share: float) -> Change:
    def cut(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        width, height = int(image.width * share), int(image.height * share)
        x, y = (int(rng.integers(0, slack + 1)) for slack in (image.width - width, image.height - height))
        return image.crop((x, y, x + width, y + height))

    return _of_image(cut)


def _pictures(*, changed: float, crops: float | None) -> dict[str, tuple[Change, float | None]]:
    """Return the changes of pictures with the share that must be found; None: it is only stated."""
    return {
        "same": (_of_image(lambda image, _: image), 1.0),
        "JPEG of quality 30": (
            _of_image(lambda image, _: Image.open(io.BytesIO(_bytes(image, "JPEG", quality=30)))),
            changed,
        ),
        "half the size": (_of_image(lambda image, _: image.resize((image.width // 2, image.height // 2))), 0.95),
        "brighter": (_of_image(lambda image, _: image.point(lambda value: min(255, value * 6 // 5 + 10))), changed),
        "crop to 90 % of each side": (_crop(0.9), crops),
        "crop to 80 %": (_crop(0.8), crops),
        "crop to 70 %": (_crop(0.7), None),
    }


_KINDS: dict[str, tuple[Callable[[np.random.Generator], list[Item]], dict[str, tuple[Change, float | None]]]] = {
    "text": (
        _texts,
        {
            "same": (lambda item, _: item, 1.0),
            "other case and punctuation": (lambda item, _: str(item).upper().replace(" ", ", "), 1.0),
            "a quarter of it": (lambda item, _: " ".join(str(item).split()[30:50]), 1.0),
            "every sixth word changed": (_reworded, None),
        },
    ),
    "photo": (_photos, _pictures(changed=0.85, crops=0.8)),  # a piece of sky keeps little after either
    "drawing": (_drawings, _pictures(changed=0.95, crops=0.8)),
    "page of text": (_pages, _pictures(changed=0.95, crops=None)),
}
