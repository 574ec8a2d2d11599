"""A server as a process: started, waited for, watched while it answers, and ended with all that it started."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from finetune.ask.endpoint import Endpoint
from finetune.ask.exchange import EndpointError, text_of

HOST = "127.0.0.1"
GRACE_S = 20.0
"""Seconds that a server may take to end by itself; after that its processes are killed."""
_PAUSE_S = 0.25
_LAST_LINES = 12


class ServerError(EndpointError):
    """The server did not start, ended, or is not the one that was meant."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server."""

    process: "subprocess.Popen[bytes]"
    url: str
    log: Path

    def wait(self, seconds: float) -> None:
        """Sleep; raise as soon as the server has ended, as it will not answer any more."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.require_alive()

    def require_alive(self) -> None:
        """Raise if the server has ended."""
        code = self.process.poll()
        if code is not None:
            raise ServerError(f"the server ended with {_meaning(code)}. {self.last_lines()}")

    def last_lines(self) -> str:
        """Return the end of what the server wrote, and where the rest is."""
        lines = self.log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        shown = "".join(f"\n  {line}" for line in lines)
        return f"Its last lines, of {self.log}:{shown}" if lines else f"It wrote nothing to {self.log}"

    def endpoint(self, name: str, *, timeout: float) -> Endpoint:
        """Return the endpoint of one of its models; a request fails at once when the server ends."""
        return Endpoint(url=self.url, model=name, timeout=timeout, attempts=2, wait=self.wait)


@contextmanager
def running(
    command: Sequence[str],
    *,
    port: int,
    names: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    seconds: float,
) -> Iterator[Server]:
    """Start a server, wait until it lists the models of these names, and end it after the block.

    A process group of its own holds the server and what it starts. SIGTERM ends the block as Ctrl-C does.
    """
    require_free(port)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output, _terminated_as_interrupted():
        try:
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL, process_group=0
            )
        except OSError as error:
            raise ServerError(f"{command[0]} could not be started: {error}") from error
        server = Server(process=process, url=f"http://{HOST}:{port}/v1", log=log)
        try:
            _wait_until_ready(server, names, seconds)
            yield server
        finally:
            end_group(process)


def require_free(port: int) -> None:
    """Raise if something listens at the port: it would answer in the place of our server."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServerError(f"port {port} of {HOST} cannot be used: {error}. Choose another one") from error


def free_port() -> int:
    """Return a port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(server: Server, names: Sequence[str], seconds: float) -> None:
    """Return when the server lists its models; raise if it ends, takes too long, or lists others."""
    deadline = time.monotonic() + seconds
    asked = Endpoint(url=server.url, attempts=1, timeout=5.0)
    while True:
        server.require_alive()
        try:
            listed = asked.call("/v1/models", parse=_names)
            break
        except EndpointError as error:
            if time.monotonic() > deadline:
                raise ServerError(
                    f"the server was not ready after {seconds:g} seconds ({error}). {server.last_lines()}"
                ) from error
        time.sleep(_PAUSE_S)
    if missing := [name for name in names if name not in listed]:
        raise ServerError(f"{server.url} serves {', '.join(listed) or 'no model'}, not {', '.join(missing)}")


def _names(tree: Any) -> list[str]:
    return [text_of(entry["id"]) for entry in tree["data"]]


def end_group(process: "subprocess.Popen[bytes]", grace: float = GRACE_S) -> None:
    """End a process and all of its group: first politely, then by force."""
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, grace)):
        if not _signalled(process.pid, number):
            break
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and (process.poll() is None or _signalled(process.pid, 0)):
            time.sleep(0.05)
    process.wait()


def _signalled(group: int, number: int) -> bool:
    """Send a signal to a group, and say whether anybody was there."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt inside the block, so that what was started is ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _meaning(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
