"""The trainer's end of Weights & Biases: messages go to a separate process, and nothing ever waits for it.

Every failure gives one warning, and the run continues: metrics.jsonl has everything. A run that cannot be opened online
is recorded offline, and can be uploaded later with `wandb sync`.
"""

import json
import os
import queue
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from finetune.config import TrackConfig

START_S = 12.0
"""Seconds that the client may take to open a run, online or offline."""
FINISH_S = 12.0
"""Seconds that the end of a run waits until the rest is written or uploaded."""
WAITING = 10_000
"""The number of messages that may wait for a slow client before it is given up."""


def run_id(folder: Path) -> str:
    """Return the run's id at W&B; it is stored in the run folder, so every start uses the same one."""
    path = folder / "wandb" / "run-id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


class WandbLink:
    """Sends one run to W&B, from global rank 0. Only `close` takes time, and little more than FINISH_S."""

    def __init__(
        self,
        config: TrackConfig,
        folder: Path,
        *,
        name: str,
        settings: Mapping[str, Any],
        done: int,
        warn: Callable[[str], None],
    ) -> None:
        self._config, self._folder = config, folder
        self._warn = warn
        self._start = {
            "folder": str(folder.absolute()),
            "name": name,
            "project": config.project,
            "entity": config.entity,
            "group": config.group,
            "tags": list(config.tags),
            "config": settings,
            "done": done,
            "timeout": START_S - 2,
        }
        self._messages: queue.Queue[Mapping[str, Any]] = queue.Queue(WAITING)
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._over = False
        self._thread = threading.Thread(target=self._serve, daemon=True, name="wandb")
        self._process_made = threading.Event()
        self._thread.start()
        # Readers are forked next. A reader that is forked while the process starts would inherit one of its pipes, and
        # the thread would then wait until that reader ends.
        self._process_made.wait(START_S)

    def send(self, kind: str, values: Mapping[str, Any]) -> None:
        """Send a message, or drop it; never waits."""
        if self._over:
            return
        try:
            self._messages.put_nowait({"kind": kind, "values": values})
        except queue.Full:
            self._give_up(f"the client is {WAITING:,} messages behind")

    def close(self, *, code: int, preempted: bool = False) -> None:
        """Let the client finish, but do not wait for long."""
        if not self._over:
            self.send("finish", {"code": code, "preempted": preempted})
            self._thread.join(FINISH_S)
            if self._thread.is_alive():
                self._give_up(f"the client did not finish within {FINISH_S:g} s; `wandb sync` uploads the rest")
        self._kill()
        self._thread.join(1.5)  # the thread closes its ends of the pipes

    def abandon(self) -> None:
        """Wait for nothing: the process sees its input end, marks the run as failed, and ends by itself."""
        self._over = True

    def _serve(self) -> None:
        """Open the run, then send message by message, without a time limit; this runs in the thread."""
        reason = self._open(self._config.wandb)
        if reason and self._config.wandb == "online" and not self._over:
            offline = self._open("offline")
            if not offline:
                self._say(
                    f"no run online ({reason}); it is recorded offline, upload it with: wandb sync {self._folder}/wandb"
                )
            reason = offline and f"{reason}; and offline: {offline}"
        if reason:
            self._give_up(reason)
            return
        process = self._process
        assert process is not None
        try:
            self._hand_over(process)
        except OSError:
            self._give_up("the client's process died" + self._log_tail())
        finally:
            _close(process)

    def _hand_over(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        while not self._over:
            try:
                message = self._messages.get(timeout=1.0)
            except queue.Empty:
                continue
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            if message["kind"] == "finish":
                if "finished" not in _answer(process.stdout, FINISH_S):
                    self._give_up("the client ended before everything was written" + self._log_tail())
                return

    def _make(self) -> "subprocess.Popen[str]":
        with self._log_path().open("a") as log:
            return subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("wandb_writer.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env=os.environ | {"PYTHONSAFEPATH": "1"},
            )

    def _open(self, mode: str) -> str:
        """Start the process and open a run; return why that failed, or ""."""
        try:
            if find_spec("wandb") is None:
                return "wandb is not installed: pip install wandb"
            start = {**self._start, "mode": mode, "id": run_id(self._folder)}
            process = self._process = self._make()
        except OSError as error:
            return str(error)
        finally:
            self._process_made.set()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(start) + "\n")
            process.stdin.flush()
            began = time.monotonic()
            answer = _answer(process.stdout, START_S)
        except OSError as error:
            return str(error)
        if "run" in answer:
            return ""
        is_late = time.monotonic() - began >= START_S
        self._kill()
        _close(process)
        return f"no answer within {START_S:g} s" if is_late else "the client could not start" + self._log_tail()

    def _give_up(self, reason: str) -> None:
        with self._lock:
            if self._over:
                return
            self._over = True
        self._kill()
        self._say(f"{reason}. The run continues without it; metrics.jsonl has everything")

    def _say(self, text: str) -> None:
        self._warn(f"warning: W&B: {text}")

    def _kill(self) -> None:
        """End the process and its children."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _log_path(self) -> Path:
        return self._folder / "logs" / "wandb.log"

    def _log_tail(self) -> str:
        lines = self._log_path().read_text(errors="replace").split("\n") if self._log_path().exists() else []
        words = [line.strip() for line in lines if line.strip()]
        return f": {words[-1][:300]}" if words else ""


def _close(process: "subprocess.Popen[str]") -> None:
    """Close our ends of the pipes of a process that has ended."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()


def _answer(stream: IO[str], seconds: float) -> str:
    """Return the next line of a process, or "" if none comes in time."""
    ready, _, _ = select.select([stream], [], [], seconds)
    return stream.readline() if ready else ""
