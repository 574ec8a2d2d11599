"""Runs started as users start them: a toy base and rows, and the commands that were rendered for them."""

import json
import os
import subprocess
from pathlib import Path

from limits import LIMIT_S
from places import ROOT

from finetune.files.tiny import write_tiny
from launchers.render import Rendered


def toy_run(folder: Path, rows: int = 24) -> None:
    """Write `base` and `rows.jsonl`, all of it text."""
    write_tiny(folder / "base")
    turns = [
        [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}] for n in range(rows)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))


def environment() -> dict[str, str]:
    """Of ranks on this machine's CPU, with this clone's code.

    DeepSpeed compiles a function of an optimiser that nothing uses: 1.2 of a rank's eight CPU seconds.
    """
    ours = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    return os.environ | ours


def start_rendered(rendered: Rendered, folder: Path) -> subprocess.CompletedProcess:
    """Write the files where the command looks for them, and run it to its end."""
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
