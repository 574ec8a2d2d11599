"""The data of `moetune demo`: letters drawn here for the base, scikit-learn's handwritten digits for the task.

Both are eight by eight grey cells shown as 64 x 64 pixels, so that one image is four tokens and two cores suffice.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

LETTERS = "ACDEFHKMNPRTUVXY"  # none that a digit resembles
QUESTION = "What is it?"
HELD_OUT = 297
CELL = 8

BASE = """\
# phase 1: every weight of a random base, on letters and a little counting in words
model: {path: start, dtype: float32}
adapters:
  attention: {mode: full}
  experts: {mode: full}
  router: {mode: full}
  vision_blocks: {mode: full}
  merger: {mode: full}
  deepstack_mergers: {mode: full}
  patch_embed: {mode: full}
  pos_embed: {mode: full}
  norms: {mode: full}
  embeddings: {mode: full}
  head: {mode: full}
moe: {balance: global}
parallel: {ep: 2, recompute: none}
data:
  packs_per_step: 4
  tokens_per_pack: 512
  workers: 0
  sources: {letters: {path: shards/letters}}
optim: {lr: 3.0e-3}
schedule: {steps: 120, warmup_steps: 15}
checkpoint: {every_steps: 0}
run: {name: base}
"""

DIGITS = """\
# phase 2: LoRA wherever there is a matrix, experts and routers included, on digits
model: {path: runs/base/model, dtype: float32}
adapters:
  attention: {mode: lora, r: 16, alpha: 32}
  experts: {mode: lora, r: 16, alpha: 32}
  router: {mode: lora}
  vision_blocks: {mode: lora, r: 16, alpha: 32}
  merger: {mode: lora, r: 16, alpha: 32}
  deepstack_mergers: {mode: lora, r: 16, alpha: 32}
moe: {balance: global}
parallel: {ep: 2, recompute: none}
data:
  packs_per_step: 4
  tokens_per_pack: 512
  workers: 0
  sources: {digits: {path: shards/train}}
optim: {lr: 6.0e-3}
schedule: {steps: 160, warmup_steps: 10}
checkpoint: {every_steps: 0}
run: {name: digits}
"""


def write_material(folder: Path, *, letters: int = 3000) -> None:
    """Write recipes, pictures and rows; the same bytes every time, with the same library versions."""
    from sklearn.datasets import load_digits

    folder.mkdir(parents=True)
    (folder / "base.yaml").write_text(BASE)
    (folder / "digits.yaml").write_text(DIGITS)
    rng = random.Random(0)
    names = [LETTERS[number % len(LETTERS)] for number in range(letters)]
    rows = [_row(_save(_letter(rng, name), folder, f"letters/{number}.png"), name) for number, name in enumerate(names)]
    _write_rows(folder / "letters.jsonl", [*rows, *_counting(rng, letters // 5)])
    digits = load_digits()
    order = random.Random(1).sample(range(len(digits.images)), len(digits.images))
    rows = [
        _row(_save((digits.images[at] * 15.9375).astype("uint8"), folder, f"digits/{at}.png"), str(digits.target[at]))
        for at in order
    ]
    _write_rows(folder / "held-out.jsonl", rows[:HELD_OUT])
    _write_rows(folder / "train.jsonl", rows[HELD_OUT:])


def picture_lines(path: Path) -> list[str]:
    """Return one of these pictures in characters, for a terminal."""
    import numpy as np
    from PIL import Image

    cells = np.asarray(Image.open(path).convert("L"))[CELL // 2 :: CELL, CELL // 2 :: CELL]
    return ["".join(2 * " .:*#@"[int(cell) * 5 // 255] for cell in row).rstrip() for row in cells]


def _letter(rng: random.Random, name: str) -> "np.ndarray[Any, Any]":
    """Draw one letter, each time of another size, weight, slant and place."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    canvas = Image.new("L", (128, 128))
    width = rng.randint(2, 6)
    font = ImageFont.load_default(rng.randint(60, 84))
    ImageDraw.Draw(canvas).text((64, 64), name, fill=255, font=font, anchor="mm", stroke_width=width, stroke_fill=255)
    canvas = canvas.rotate(rng.uniform(-15, 15), resample=Image.Resampling.BICUBIC)
    left, top, right, bottom = canvas.getbbox() or (0, 0, 128, 128)
    edge = rng.randint(-2, 6)
    cut = canvas.crop((left - edge - rng.randint(0, 6), top - edge, right + edge + rng.randint(0, 6), bottom + edge))
    return np.asarray(cut.resize((8, 8), Image.Resampling.BOX))


def _save(cells: "np.ndarray[Any, Any]", folder: Path, name: str) -> str:
    from PIL import Image

    (folder / name).parent.mkdir(exist_ok=True)
    Image.fromarray(cells.repeat(CELL, 0).repeat(CELL, 1)).convert("RGB").save(folder / name)
    return name


def _row(image: str, answer: str) -> dict[str, Any]:
    return _turns(f"<image>{QUESTION}", answer) | {"images": [image]}


def _turns(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _counting(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Return rows of text alone, so that the base can write digits though it never saw one."""
    numbers = [rng.randint(0, 8) for _ in range(count)]
    return [
        _turns(f"What comes after {n}?", str(n + 1)) if at % 2 else _turns(f"What comes before {n + 1}?", str(n))
        for at, n in enumerate(numbers)
    ]


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
