"""The process that talks to Weights & Biases: this file as a script, started by `finetune.tracking.wandb_link`.

It is a separate process because the client may hang in a login, die, or install signal handlers, and none of that may
affect the training. It imports none of our code. It reads one JSON object per line from standard input; the first one
says how to start. It writes one line when the run is open, and another when everything is written. If the input ends
without a `finish`, the training has died.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from PIL import Image

PATIENCE_S = 10
"""Seconds that uploading the rest may take after the last message."""
CELL = (4, 6)
"""Width and height in pixels of one expert of one layer in the heatmap."""
REPLAYED = {"metrics.jsonl": 0, "expert_load.jsonl": 0, "evaluations.jsonl": 1, "predictions.jsonl": 1}
"""The files in the run folder that are sent again to an offline run, with the number of the first step in each."""


def heatmap(counts: list[list[int]]) -> Image.Image:
    """Draw layers (down) by experts (across): white at no token, blue at an even share, red at twice that."""
    counts_LE = np.array(counts, dtype=np.float64)
    share_LE = np.clip(counts_LE / np.maximum(counts_LE.mean(1, keepdims=True), 1e-9) / 2, 0, 1)
    stops = np.array([[255, 255, 255], [33, 102, 172], [178, 24, 43]], dtype=np.float64)
    rgb_LE3 = np.stack([np.interp(share_LE, [0, 0.5, 1], stops[:, channel]) for channel in range(3)], -1)
    large = rgb_LE3.round().astype(np.uint8).repeat(CELL[1], 0).repeat(CELL[0], 1)
    return Image.fromarray(large)


def log(run: Any, message: dict[str, Any]) -> None:
    """Pass one message to the client; the x axis of every value is its step."""
    kind, values = message["kind"], message["values"]
    at = {"step": values["step"]}
    if kind == "metrics":
        sources = {
            f"source/{name}/{key}": value
            for name, of_source in values.get("sources", {}).items()
            for key, value in of_source.items()
        }
        figures = {key: value for key, value in values.items() if key != "sources"} | sources
        run.log({key: value for key, value in figures.items() if value is not None})
    elif kind == "evaluations":
        run.log(at | {f"eval/{key}": value for key, value in values.items() if key != "step" and value is not None})
    elif kind == "expert_load":
        run.log(at | {"expert_load": wandb.Image(heatmap(values["counts"]), caption="layers by experts")})
    elif kind == "predictions":
        names = sorted({name for row in values["rows"] for name in row})
        cells = [[row.get(name) for name in names] for row in values["rows"]]
        run.log(at | {"predictions": wandb.Table(columns=names, data=cells)})
    elif kind == "pictures":
        run.log(at | {"pictures": [wandb.Image(file, caption=key) for file, key in values["files"]]})
    else:
        assert kind == "adapter", kind
        artifact = wandb.Artifact(f"adapter-{run.id}", type="model", metadata=at)
        artifact.add_dir(values["folder"], policy="immutable")  # the folder is not copied
        run.log_artifact(artifact, aliases=values["aliases"])


def earlier(folder: Path, done: int) -> Iterator[dict[str, Any]]:
    """Yield the records of earlier starts, up to step `done`, as messages."""
    for name, first in REPLAYED.items():
        if (folder / name).exists():
            for line in (folder / name).read_text().splitlines(keepends=True):
                if not line.endswith("\n"):
                    break  # still being written: the trainer has begun its own steps
                values = json.loads(line)
                if values["step"] < done + first:
                    yield {"kind": name.removesuffix(".jsonl"), "values": values}


def open_run(start: dict[str, Any]) -> Any:
    """Open the run, the same one at every start.

    An offline run of an earlier start cannot be continued, and two would be uploaded as two runs. So the new one is
    filled from the run folder, and the old one is removed.
    """
    folder = Path(start["folder"])
    wandb_folder = folder / "wandb"
    wandb_folder.mkdir(exist_ok=True)
    (wandb_folder / ".writable").touch()  # otherwise the client would silently write somewhere else
    (wandb_folder / ".writable").unlink()
    old = sorted(wandb_folder.glob(f"offline-run-*-{start['id']}"))
    run = wandb.init(
        mode=start["mode"],
        id=start["id"],
        resume="allow",
        dir=str(folder),
        name=start["name"],
        project=start["project"],
        entity=start["entity"] or None,
        group=start["group"] or None,
        tags=start["tags"],
        config=start["config"],
        allow_val_change=True,
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, init_timeout=start["timeout"]),
    )
    run.define_metric("*", step_metric="step")  # a resumed run may log steps again
    if start["mode"] == "offline":
        for message in earlier(folder, start["done"]):
            log(run, message)
        for path in old:
            shutil.rmtree(path)
    return run


def main() -> None:
    """Serve one run until its input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the trainer gets them too, and decides when to end
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    start = json.loads(sys.stdin.readline())
    run = open_run(start)
    answers.write(json.dumps({"run": run.id}) + "\n")
    code = 1
    for line in sys.stdin:
        message = json.loads(line)
        if message["kind"] == "finish":
            code = message["values"]["code"]
            if message["values"]["preempted"]:
                run.mark_preempting()
            break
        log(run, message)
    signal.alarm(PATIENCE_S)  # without a handler, it ends this process
    run.finish(exit_code=code)
    answers.write(json.dumps({"finished": True}) + "\n")


if __name__ == "__main__":
    main()
