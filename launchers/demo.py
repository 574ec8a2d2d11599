"""`moetune demo`: every part once, on a CPU, on pictures drawn here: base, shards, two-rank training, adapter."""

import argparse
import json
from pathlib import Path

EXAMPLE = """\
  moetune demo runs/demo"""

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30)}
STEPS = 30


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")


def run(args: argparse.Namespace) -> int:
    """Run each command as a user would type it, and say what came of it; the first that fails ends the demo."""
    out: Path = args.out
    if out.exists():
        raise ValueError(f"{out} exists; give another folder, or remove it")
    _draw(out / "drawn", 96)
    lora = ["adapters.attention.mode=lora", "adapters.experts.mode=lora"]
    commands = [
        f"tiny {out}/base",
        f"shards build {out}/drawn/rows.jsonl --out {out}/shards",
        f"shards stats {out}/shards --base {out}/base --context 512",
        f"train tiny-cpu --ranks 2 model.path={out}/base data.sources.general.path={out}/shards run.name={out.name} "
        f"model.dtype=float32 schedule.steps={STEPS} optim.lr=5e-3 {' '.join(lora)}",
    ]
    from launchers.cli import main

    for command in commands:
        print(f"$ moetune {command}", flush=True)
        code = main(command.split())
        if code:
            print(f"demo: stopped, `moetune {command.split()[0]}` ended with {code}")
            return 1
    lines = (Path("runs") / out.name / "metrics.jsonl").read_text().splitlines()
    first, last = (json.loads(line)["loss"] for line in (lines[0], lines[-1]))
    print(
        f"demo: a base of random weights, LoRA on attention and experts, ZeRO-3 and expert parallelism on 2 ranks: "
        f"loss {first:.2f} -> {last:.2f} in {len(lines)} steps on {len(COLOURS)} colours. It shows that the parts "
        f"work together, no more: such a base knows nothing."
    )
    return 0 if last < first else 1


def _draw(folder: Path, count: int) -> None:
    """Plain pictures of one colour each, and the rows that ask for it."""
    from PIL import Image

    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        name, colour = list(COLOURS.items())[number % len(COLOURS)]
        Image.new("RGB", (64, 48 + 16 * (number % 3)), colour).save(folder / f"{number}.png")
        asked = {"role": "user", "content": "<image>Which colour is this?"}
        rows.append({"messages": [asked, {"role": "assistant", "content": name}], "images": [f"{number}.png"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
