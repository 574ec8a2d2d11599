"""Write the pictures of README and the pages: `python -m benchmarks.pictures` (needs a Chromium, and the extra `demo`).

It runs `moetune demo`, which takes minutes, and trains a base with more experts for the heatmap. `--demo FOLDER` uses a
folder in which an earlier call has done so.
"""

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.text import Text

from benchmarks.gpu.material import PHOTOGRAPHS, photographs
from launchers.cli import main as moetune

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
MOST_BYTES = 300_000
"""The largest size of a picture."""
LINES = (16, 26)
"""Lines of the demo's output that are shown, from its beginning and from its end."""
WIDE = "--layers 12 --experts 48 --top-k 4 --hidden 64 --head-dim 32 --expert-hidden 24 --image-min-tokens 4"
"""The base of the heatmap: a tiny one, with enough experts for a picture."""
SVG = (
    '<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg"><style>'
    ".{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, monospace; font-size: {char_height}px; "
    "line-height: {line_height}px; font-variant-east-asian: full-width; }} .{unique_id}-title {{ font-size: 18px; "
    'font-weight: bold; font-family: sans-serif; }} {styles}</style><defs><clipPath id="{unique_id}-clip-terminal">'
    '<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>{lines}</defs>{chrome}'
    '<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">{backgrounds}'
    '<g class="{unique_id}-matrix">{matrix}</g></g></svg>'
)
"""The form of rich's pictures without its fonts, which a reader's browser would fetch from elsewhere."""


def main(argv: Sequence[str]) -> int:
    """Write every picture, and print its size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("--demo", type=Path, metavar="FOLDER", help="a folder that an earlier call has filled")
    args = parser.parse_args(argv)
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.demo or Path(temporary) / "demo"
        material(folder)
        terminal(folder / "demo.log", PICTURES / "demo.svg")
        sheet(folder, PICTURES / "contact-sheet.png")
        screenshots(folder)
    too_large = [path.name for path in sorted(PICTURES.iterdir()) if path.stat().st_size > MOST_BYTES]
    for path in sorted(PICTURES.iterdir()):
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    return 3 if too_large else 0


def material(folder: Path) -> None:
    """Run the demo in `folder`, keep its output, and train the base of the heatmap; skip what is there."""
    if not (folder / "runs" / "digits").is_dir():
        done = subprocess.run(
            [sys.executable, "-m", "launchers.cli", "demo", str(folder)], capture_output=True, text=True, check=True
        )
        (folder / "demo.log").write_text(done.stdout)
    if not (folder / "runs" / "wide").is_dir():
        with chdir(folder):
            words = ["base.yaml", "--ranks", "2", "model.path=wide", "run.name=wide", "schedule.steps=80"]
            if moetune(["tiny", "wide", *WIDE.split()]) or moetune(["train", *words, "track.load_every=2"]):
                raise ValueError(f"the base of the heatmap did not train; look at {folder / 'runs' / 'wide' / 'logs'}")


def terminal(log: Path, out: Path) -> None:
    """Draw the beginning and the end of the demo's output as a terminal."""
    lines = [line for line in log.read_text().splitlines() if not re.match(r"step \d+: ", line)]
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    for line in [*lines[: LINES[0]], "...", *lines[-LINES[1] :]]:
        console.print(Text(line, style="bold cyan" if line.startswith("$ ") else ""), no_wrap=True, overflow="ellipsis")
    out.write_text(console.export_svg(title="moetune demo", code_format=SVG))


def sheet(folder: Path, out: Path) -> None:
    """Draw a sample of two photographs with boxes, as a model sees it."""
    with chdir(folder):
        for name, content in zip(PHOTOGRAPHS, photographs(), strict=True):
            Path(name).write_bytes(content)
        question = {"role": "user", "content": "<image><image>Where is the blossom?"}
        row = {
            "messages": [question, {"role": "assistant", "content": "<bbox>"}],
            "images": list(PHOTOGRAPHS),
            "objects": {"ref": [], "bbox": [[198, 44, 475, 344]], "image_id": [1]},
        }
        Path("photographs.jsonl").write_text(json.dumps(row) + "\n")
        shown = ["shards", "show", "shards/photographs", "--base", "runs/base/model", "--sheet", "sheet.png"]
        is_built = Path("shards", "photographs").is_dir()
        if not is_built and moetune(["shards", "build", "photographs.jsonl", "--out", "shards/photographs"]):
            raise ValueError("the photographs were not built into a shard")
        if moetune(shown):
            raise ValueError("the contact sheet was not written")
        with Image.open("sheet.png") as image:
            drawn = image.crop((0, 0, 448, 162))
    drawn.save(out, optimize=True)


def screenshots(folder: Path) -> None:
    """Write the top of the digits' report, and the heatmap of the base with more experts."""
    from playwright.sync_api import sync_playwright

    from benchmarks.harness.browser import chromium

    with chdir(folder), sync_playwright() as started:
        for name in ("digits", "wide"):
            if moetune(["report", f"runs/{name}"]):
                raise ValueError(f"the report of {name} was not written")
        browser = chromium(started)
        page = browser.new_page(viewport={"width": 1280, "height": 1440})
        page.goto(Path("runs/digits/report.html").absolute().as_uri())
        _keep(page.screenshot(), PICTURES / "report.png")
        page.goto(Path("runs/wide/report.html").absolute().as_uri())
        card: Any = page.locator(".card", has=page.locator("canvas.heat"))
        _keep(card.screenshot(), PICTURES / "heatmap.png")
        browser.close()


def _keep(png: bytes, out: Path) -> None:
    """Write a picture in 256 colours, which are a third of the bytes."""
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
