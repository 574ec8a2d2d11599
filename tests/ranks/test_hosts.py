"""Several real hosts: TCP rendezvous between namespaces, one is cut off mid-run, and the run continues exactly."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest
from hosts import Host, hosts
from starts import environment, toy_run

from launchers.render import SAFE, SHUTDOWN

STALL_S = 8
STEPS = 9
WORDS = [
    "model.path=base",
    "data.sources.general.path=rows.jsonl",
    "model.dtype=float32",
    "data.workers=0",
    "data.packs_per_step=4",
    "data.tokens_per_pack=128",
    "checkpoint.every_steps=3",
    "data.stall_seconds=6",
    f"run.stall_seconds={STALL_S}",
    "parallel.ep=2",
    "data.mixture=natural",
]


def _start(
    here: list[Host],
    folder: Path,
    name: str,
    *words: str,
    restarts: int = 0,
    min_nodes: int = 0,
    ranks: int = 2,
    site: Path | None = None,
) -> list[tuple[subprocess.Popen, Path]]:
    """Start one run with a bare torchrun on each host."""
    words = ["tiny-cpu", *WORDS, f"run.name={name}", *words]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    if len(here) == 1:
        torchrun += ["--standalone"]
    else:
        torchrun += [f"--nnodes={min_nodes or len(here)}:{len(here)}", "--rdzv_backend=c10d"]
        torchrun += [f"--rdzv_endpoint={here[0].address}:29500", f"--rdzv_id={name}-{uuid4().hex}"]
        torchrun += ["--rdzv_conf=join_timeout=60,close_timeout=5"]
    torchrun += [
        f"--nproc_per_node={ranks}",
        f"--max_restarts={restarts}",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    ]
    torchrun += ["-m", "finetune.train", *words]
    started = []
    for number, host in enumerate(here):
        command = list(torchrun)
        if len(here) > 1:
            at = next(index for index, word in enumerate(command) if word.startswith("--rdzv_conf="))
            # hosts of one machine have one name, so the holder of the store is set; a dead host is noticed sooner
            command[at] += f",is_host={'true' if number == 0 else 'false'},last_call_timeout=2,keep_alive_interval=1"
            command.insert(at, f"--local_addr={host.address}")
        settings = (
            environment()
            | SAFE
            | {SHUTDOWN: "5", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            | {"GLOO_SOCKET_IFNAME": "eth0"}
        )
        settings["PYTHONPATH"] += f"{os.pathsep}{site}" if site else ""
        output = folder / f"{name}-{number}.txt"
        started.append((host.start(command, folder=folder, environment=settings, output=output), output))
    return started


def _metrics(folder: Path, name: str) -> list[dict]:
    path = folder / "runs" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _wait_for_step(folder: Path, name: str, step: int, started, limit: float = 120) -> None:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if any(
            (folder / "runs" / name / "checkpoints" / "LATEST").exists() and line["step"] >= step
            for line in _metrics(folder, name)
        ):
            return
        time.sleep(0.2)
    raise AssertionError("\n".join(output.read_text()[-2000:] for _, output in started))


def _losses(folder: Path, name: str) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in _metrics(folder, name)}


def _finish(started, limit: float = 150) -> list[int]:
    try:
        return [process.wait(limit) for process, _ in started]
    except subprocess.TimeoutExpired:
        raise AssertionError("\n".join(output.read_text()[-3000:] for _, output in started)) from None
    finally:
        for process, _ in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_host_cut_off_mid_run_ends_it_in_time_and_it_resumes_on_one_host_fewer(
    tmp_path: Path,
) -> None:
    toy_run(tmp_path, rows=216)
    with hosts(2) as here:
        whole = _start(here, tmp_path, "whole", f"schedule.steps={STEPS}")
        assert _finish(whole) == [0, 0], whole[0][1].read_text()[-3000:]
        wanted = _losses(tmp_path, "whole")
        assert sorted(wanted) == list(range(STEPS))

        cut = _start(here, tmp_path, "cut", f"schedule.steps={STEPS}")
        _wait_for_step(tmp_path, "cut", 3, cut)
        here[1].cut_off()
        began = time.monotonic()
        assert cut[0][0].wait(STALL_S + 60) != 0
        assert time.monotonic() - began < STALL_S + 45
        log = cut[0][1].read_text()
        assert "collective stall: step" in log or "Connection" in log, log[-3000:]
        here[1].end()
        cut[1][0].wait(20)

    with hosts(2) as here:  # one host fewer than before: one agent, two ranks
        again = _start(here[:1], tmp_path, "cut", f"schedule.steps={STEPS}")
        assert _finish(again) == [0], again[0][1].read_text()[-3000:]
        assert "resumed: " in again[0][1].read_text()
        losses = _losses(tmp_path, "cut")
    assert sorted(losses) == list(range(STEPS))
    assert [losses[step] for step in range(STEPS)] == pytest.approx([wanted[step] for step in range(STEPS)], rel=1e-5)


IN_SAVE = """
import os, sys, time
def at_its_file(event, arguments):
    if event != "open" or os.environ.get("RANK") != "1":
        return
    if "shard-00002-" in str(arguments[0]) and "w" in (arguments[1] or ""):
        open("in-save", "w").close()
        time.sleep(4)
sys.addaudithook(at_its_file)
"""


@pytest.mark.slow
def test_a_host_cut_off_in_a_save_is_missed_soon_even_if_it_still_reaches_the_disk(tmp_path: Path) -> None:
    toy_run(tmp_path, rows=216)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(IN_SAVE)
    with hosts(2) as here:
        cut = _start(here, tmp_path, "cut", f"schedule.steps={STEPS}", ranks=1, site=tmp_path / "site")
        while not (tmp_path / "in-save").exists():
            assert cut[0][0].poll() is None, cut[0][1].read_text()[-3000:]
            time.sleep(0.1)
        here[1].cut_off()
        began = time.monotonic()
        assert cut[0][0].wait(120) != 0
        assert time.monotonic() - began < 4 + 2 * STALL_S + 45  # not the eight limits of a slow disk
        log = cut[0][1].read_text()
        assert re.search(r"in the checkpoint. No rank is writing, and another rank has not arrived", log), log[-3000:]
        assert not (tmp_path / "runs" / "cut" / "checkpoints" / "step-000003").exists()
        here[1].end()
        cut[1][0].wait(20)


@pytest.mark.slow
def test_four_hosts_restart_without_the_one_that_was_cut_off(tmp_path: Path) -> None:
    toy_run(tmp_path, rows=216)
    with hosts(4) as here:
        words = [f"schedule.steps={STEPS}", "parallel.ep=1", "data.packs_per_step=12"]
        whole = _start(here[:1], tmp_path, "one", *words, ranks=1)
        assert _finish(whole) == [0], whole[0][1].read_text()[-3000:]
        started = _start(here, tmp_path, "four", *words, restarts=3, min_nodes=3, ranks=1)
        _wait_for_step(tmp_path, "four", 3, started)
        here[3].cut_off()
        assert _finish(started[:3]) == [0, 0, 0], started[0][1].read_text()[-3000:]
        here[3].end()
        started[3][0].wait(20)
    losses, wanted = _losses(tmp_path, "four"), _losses(tmp_path, "one")
    assert sorted(losses) == list(range(STEPS))
    assert [losses[step] for step in range(STEPS)] == pytest.approx([wanted[step] for step in range(STEPS)], rel=1e-4)
    assert "resumed: " in "".join(output.read_text() for _, output in started[:3])
