"""Start runs as users do: with a toy base and rows, and with the commands rendered for them."""

import json
import os
import subprocess
from pathlib import Path

from limits import LIMIT_S
from PIL import Image
from places import ROOT

from finetune.files.tiny import write_tiny
from launchers.render import Rendered

COLOURS = {"red": (230, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


def toy_run(folder: Path, rows: int = 24, *, images: bool = False) -> Path:
    """Write `base` and `rows.jsonl`: text only, or three of four rows about an image in one colour."""
    write_tiny(folder / "base")
    (folder / "img").mkdir()
    colours = list(COLOURS)
    lines = [_row(folder, number, colours[number % 3] if images else str(number), images) for number in range(rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _row(folder: Path, number: int, word: str, images: bool) -> dict:
    shown = images and number % 4 != 3
    question = {"role": "user", "content": "<image>Which colour?" if shown else f"Say {word}."}
    row = {"messages": [question, {"role": "assistant", "content": f"It is {word}."}]}
    if not shown:
        return row
    Image.new("RGB", (48, 64), COLOURS[word]).save(folder / "img" / f"{number}.png")
    return row | {"images": [f"img/{number}.png"]}


def environment() -> dict[str, str]:
    """Return the environment of ranks on this machine's CPU, with this clone's code.

    Without TORCHDYNAMO_DISABLE, DeepSpeed compiles an unused optimiser function: 1.2 of a rank's eight CPU seconds.
    """
    ours = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    return os.environ | ours


def start_rendered(rendered: Rendered, folder: Path) -> subprocess.CompletedProcess:
    """Write the files where the command expects them, and run it to its end."""
    for name, text in rendered.files.items():
        (folder / "launch").mkdir(exist_ok=True)
        (folder / "launch" / name).write_text(text)
    return subprocess.run(
        rendered.command,
        cwd=folder,
        env=environment() | dict(rendered.environment),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
