"""Reports of a run: figures by hand, files, pictures, the bar, and every failure of W&B."""

import base64
import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb_file
import wandb_server
from limits import LIMIT_S
from rich.console import Console

from finetune.architecture.families import family
from finetune.architecture.flops import FlopMeter, Training, Work
from finetune.config import TrackConfig
from finetune.ranks.log import RankLog
from finetune.tracking.metrics import Ranks, Share, figures, gather_shares
from finetune.tracking.progress_bar import Follower, duration
from finetune.tracking.records import forget_steps
from finetune.tracking.wandb_link import WandbLink
from finetune.tracking.wandb_writer import heatmap

SHOWN = {"loss": 2.5, "grad_norm": 1.0, "lr": 1e-4, "tokens_nonpad": 900, "seconds": 2.0, "tokens_per_second": 450.0}


def test_figures_are_sums_over_ranks_and_the_slowest_rank() -> None:
    work = Work(tokens=1000, supervised=300, squares=400_000)
    shares = [
        Share(work=work, row_tokens=1024, images=3, seconds=2.0, seconds_data=0.5, memory_gb=7.0),
        Share(work=work + Work(tokens=200), row_tokens=1280, video_seconds=4.5, seconds=4.0, memory_gb=9.0, stop=15),
    ]
    assert gather_shares(shares[0], torch.device("cpu")) == [shares[0]]
    meter = FlopMeter(family("qwen3-vl-30b-a3b"), {"attention": Training(mode="lora", r=8)})
    step = figures(shares, meter, Ranks(world=2, peak_flops=1e15))
    assert {name: step[name] for name in ("tokens", "tokens_nonpad", "tokens_supervised", "images")} == {
        "tokens": 2304,
        "tokens_nonpad": 2200,
        "tokens_supervised": 600,
        "images": 3,
    }
    assert (step["seconds"], step["seconds_data"], step["memory_gb"]) == (4.0, 0.5, 9.0)
    assert (step["tokens_per_second"], step["video_seconds"]) == (550.0, 4.5)
    rate = meter.model(Work(tokens=2200, supervised=600, squares=800_000)) / 4.0 / 2
    assert step["tflops_model"] == pytest.approx(rate / 1e12)
    assert step["mfu"] == pytest.approx(rate / 1e15)
    assert figures(shares, meter, Ranks(world=2, peak_flops=None))["mfu"] is None


def test_the_heatmap_is_white_blue_red() -> None:
    drawn = np.asarray(heatmap([[0, 10, 20, 10], [5, 5, 5, 5]]))
    assert drawn.shape == (12, 16, 3)
    assert drawn[0, 0].tolist() == [255, 255, 255]
    assert drawn[0, 4].tolist() == drawn[6, 0].tolist() == [33, 102, 172]
    assert drawn[0, 8].tolist() == [178, 24, 43]


def test_damaged_lines_of_a_log_are_removed_and_do_not_prevent_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 0, "loss": 1.0}\n\xff\xfe\n[1]\n{"loss": 3}\n{"step": "1"}\n\x00\x00\n'
        b'{"step": 1}\n{"step": 2}\n{"ste'
    )
    assert forget_steps(path, 2) == 5
    assert path.read_text() == '{"step": 0, "loss": 1.0}\n{"step": 1}\n'
    assert forget_steps(path, 2) == 0
    assert forget_steps(tmp_path / "evaluations.jsonl", 2) == 0
    assert [one.name for one in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_terminal_shows_a_bar_and_other_outputs_get_lines(capsys: pytest.CaptureFixture[str]) -> None:
    step_lines: list[str] = []
    follower = Follower(step_lines.append, done=0, steps=10, console=Console(file=io.StringIO()))
    for at, seconds in enumerate((90.0, 2.0, 2.0)):
        follower.step({**SHOWN, "step": at, "seconds": seconds, "mfu": 0.25})
    follower.close()
    assert step_lines[2].startswith("step 2: loss 2.5000, norm 1, ")
    assert step_lines[2].endswith(
        "450 useful tokens/s, MFU 25.0%, 0:00:14 left"
    )  # the slow first step no longer counts
    assert duration(3725.4) == "1:02:05"

    screen, lines = io.StringIO(), list[str]()
    terminal = Console(file=screen, force_terminal=True, width=120, color_system=None)
    follower = Follower(lines.append, done=0, steps=10, console=terminal)
    follower.step({**SHOWN, "step": 4, "mfu": 0.25})
    follower.print("checkpoint: here [not markup]")
    follower.close()
    assert not lines
    for text in ("5/10", "loss 2.5000", "450 tokens/s", "MFU 25.0%", "0:00:10 left", "checkpoint: here [not markup]"):
        assert text in screen.getvalue()
    follower.print("after")
    assert capsys.readouterr().out == "after\n"


@pytest.mark.parametrize(("every", "evaluations"), [(None, 0), (0, 1), (4, 3), (1, 9)])
def test_the_time_left_includes_evaluations(every: int | None, evaluations: int) -> None:
    """Expect 8 more steps of 1 s after step 1, and evaluations of 20 s after the 4th, the 8th and the last step."""
    lines: list[str] = []
    follower = Follower(lines.append, done=0, steps=10, evaluates_every=every, console=Console(file=io.StringIO()))
    follower.evaluation(20.0)
    for at in (0, 1):
        follower.step({**SHOWN, "step": at, "seconds": 1.0})
    assert lines[-1].endswith(f"{duration(8 + 20 * evaluations)} left")


def test_messages_go_to_the_log_and_from_rank_0_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 7):
        log = RankLog(tmp_path, rank)
        log(f"from {rank}")
        log.close()
    assert capsys.readouterr().out == "from 0\n"
    assert (tmp_path / "rank-0007.log").read_text().endswith(" from 7\n")


# --- W&B --------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client needs more time on a busy machine than a run gives it."""
    for name in ("START_S", "FINISH_S"):
        monkeypatch.setattr(f"finetune.tracking.wandb_link.{name}", LIMIT_S)


def _run_folder(folder: Path) -> Path:
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    return folder


def _link(folder: Path, warnings: list[str], mode: Any = "offline", done: int = 0) -> WandbLink:
    settings = {"optim": {"lr": 0.5}}
    config = TrackConfig(wandb=mode, project="ours", tags=("a",))
    return WandbLink(config, folder, name="mine", settings=settings, done=done, warn=warnings.append)


def _step(folder: Path, link: WandbLink, at: int) -> None:
    values = {"step": at, "loss": 3.0 - at, "mfu": None}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")
    link.send("metrics", values)


def _offline_runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*"))


def test_an_offline_run_has_one_folder_even_after_a_resume(tmp_path: Path) -> None:
    folder, warnings = _run_folder(tmp_path / "runs" / "mine"), list[str]()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "file").write_text("x")
    link = _link(folder, warnings)
    for at in range(2):
        _step(folder, link, at)
    link.close(code=1, preempted=True)
    (first,) = _offline_runs(folder)

    time.sleep(1.1)  # the client names a folder by the time in seconds
    link = _link(folder, warnings, done=2)
    _step(folder, link, 2)
    link.send("expert_load", {"step": 2, "layers": [0, 1], "counts": [[1, 2], [3, 0]]})
    link.send("evaluations", {"step": 3, "general/loss": 0.5})
    link.send("predictions", {"step": 3, "rows": [{"key": "k", "answer": "red"}]})
    link.send("adapter", {"step": 3, "folder": str(tmp_path / "adapter"), "aliases": ["last", "best"]})
    link.close(code=0)
    assert not warnings, warnings
    (second,) = _offline_runs(folder)
    assert first != second
    assert (folder / "wandb" / "run-id").read_text() == first.name.split("-")[-1] == second.name.split("-")[-1]

    rows = wandb_file.history(second)
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert [row["expert_load._type"] for row in rows if "expert_load._type" in row] == ["image-file"]
    assert [row["eval/general/loss"] for row in rows if "eval/general/loss" in row] == [0.5]
    assert [row["predictions.nrows"] for row in rows if "predictions.nrows" in row] == [1]
    kept = {record.WhichOneof("record_type"): record for record in wandb_file.records(second)}
    assert kept["run"].run.project == "ours"
    assert json.loads(next(u.value_json for u in kept["run"].run.config.update if u.key == "optim")) == {"lr": 0.5}
    adapters = [r.artifact for r in wandb_file.records(second) if r.WhichOneof("record_type") == "artifact"]
    (adapter,) = [artifact for artifact in adapters if artifact.type == "model"]
    assert {"last", "best"} <= set(adapter.aliases)


def test_a_folder_that_cannot_be_written_gives_one_warning(tmp_path: Path) -> None:
    folder, warnings = _run_folder(tmp_path), list[str]()
    (folder / "wandb").write_text("a file where the client wants its folder")
    link = _link(folder, warnings)
    _step(folder, link, 0)
    link.close(code=0)
    _step(folder, link, 1)
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: W&B: ")
    assert "The run continues without it; metrics.jsonl has everything" in warnings[0]


def test_a_client_that_dies_gives_one_warning(tmp_path: Path) -> None:
    folder, warnings = _run_folder(tmp_path), list[str]()
    link = _link(folder, warnings)
    _step(folder, link, 0)
    deadline = time.monotonic() + LIMIT_S
    while not link._messages.empty() and time.monotonic() < deadline:
        time.sleep(0.05)
    (process,) = [int(pid.name) for pid in Path("/proc").iterdir() if pid.name.isdigit() and _is_writer(pid)]
    os.kill(process, signal.SIGKILL)
    for at in range(1, 4):
        _step(folder, link, at)
    began = time.monotonic()
    link.close(code=0)
    assert time.monotonic() - began < LIMIT_S  # that is FINISH_S here: nothing waits for a dead client
    assert len(warnings) == 1
    assert "W&B: the client" in warnings[0]


def _is_writer(process: Path) -> bool:
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
        parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return False
    return parent == os.getpid() and any(word.endswith(b"wandb_writer.py") for word in words)


def test_with_an_invalid_key_a_run_is_recorded_offline_and_can_be_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "broken")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    folder, warnings = _run_folder(tmp_path), list[str]()
    link = _link(folder, warnings, mode="online")
    _step(folder, link, 0)
    link.close(code=0)
    assert len(warnings) == 1, warnings
    assert warnings[0].startswith("warning: W&B: no run online (")
    assert f"wandb sync {folder}/wandb" in warnings[0]
    (run,) = _offline_runs(folder)
    assert [row["loss"] for row in wandb_file.history(run) if "loss" in row] == [3.0]


def test_a_run_is_recorded_online_and_goes_on_after_a_preemption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, warnings = _run_folder(tmp_path / "runs" / "mine"), list[str]()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("w" * 100)
    with wandb_server.serving() as server:
        monkeypatch.setenv("WANDB_API_KEY", wandb_server.KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        link = _link(folder, warnings, mode="online")
        for at in range(2):
            _step(folder, link, at)
        link.close(code=1, preempted=True)
        (run,) = server.history
        assert [(row["step"], row["loss"]) for row in server.history[run]] == [(0, 3.0), (1, 2.0)]
        assert server.preempting == [run]
        assert server.exit_codes == {run: 1}

        server.failing = 2  # the client tries again by itself
        link = _link(folder, warnings, mode="online", done=2)
        _step(folder, link, 2)
        link.send("expert_load", {"step": 2, "layers": [0, 1], "counts": [[1, 2], [3, 0]]})
        link.send("adapter", {"step": 3, "folder": str(tmp_path / "adapter"), "aliases": ["last"]})
        link.close(code=0)
    assert warnings == []
    assert list(server.history) == [run], "the same run, not a second one"
    assert [row["loss"] for row in server.history[run] if "loss" in row] == [3.0, 2.0, 1.0]
    assert server.exit_codes == {run: 0}
    started = server.upserts[0]
    assert (started["project"], started["displayName"], started["tags"]) == ("ours", "mine", ["a"])
    assert json.loads(started["config"])["optim"]["value"] == {"lr": 0.5}
    (image,) = [data for path, data in server.uploads.items() if path.endswith(".png")]
    assert image.startswith(b"\x89PNG")
    (adapter,) = [artifact for artifact in server.artifacts if artifact["artifactTypeName"] == "model"]
    assert {alias["alias"] for alias in adapter["aliases"]} >= {"last"}
    assert b"w" * 100 in server.uploads.values()
    assert server.committed >= 1
    basic = base64.b64encode(f"api:{wandb_server.KEY}".encode()).decode()
    assert server.keys == {f"Basic {basic}"}
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert wandb_server.KEY.encode() not in kept, "no key in the run's folder"
