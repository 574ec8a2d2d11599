"""Servers that fail: each is named in one message, in time, and none of its processes is left."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from limits import LIMIT_S
from process_table import is_alive

from finetune.ask.exchange import EndpointError
from finetune.serving.process import ServerError, free_port, require_free, running

# A server of a few lines. It starts a child, as real ones do, and both do not listen to SIGTERM if they are stubborn.
SERVER = """
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
port, how, pids = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if how == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(pids, "w").write(f"{os.getpid()} {child.pid}")
if how == "dies":
    sys.exit("no backend supports it")
if how == "hangs":
    time.sleep(600)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send(200, {"data": [{"id": "another" if how == "another" else "mine"}]})
    def do_POST(self):
        if how == "dies later":
            os._exit(7)
        if how == "silent":
            time.sleep(600)
        self.send(500, {"error": {"message": "out of memory"}})
    def send(self, status, tree):
        data = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *_):
        pass
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that runs such a server, and afterwards the proof that its processes are gone."""
    monkeypatch.setattr("finetune.serving.process.GRACE_S", 1.0)
    pids = tmp_path / "pids"

    def started(how: str, seconds: float = LIMIT_S):
        port = free_port()
        command = [sys.executable, "-c", SERVER, str(port), how, str(pids)]
        log = tmp_path / "server.log"
        return running(command, port=port, names=["mine"], log=log, environment=os.environ, seconds=seconds)

    yield started
    for pid in map(int, pids.read_text().split()):
        assert not is_alive(pid)


def ask(server, timeout: float = LIMIT_S) -> None:
    server.endpoint("mine", timeout=timeout).complete({"model": "mine", "messages": []})


def test_one_that_dies_at_its_start_is_quoted(start):
    with (
        pytest.raises(ServerError, match=r"(?s)ended with exit code 1. Its last lines, of .*no backend supports it"),
        start("dies"),
    ):
        pass


def test_one_that_is_never_ready_is_given_up(start):
    with (
        pytest.raises(ServerError, match=r"not ready after 2 seconds \(.*refused.*It wrote nothing"),
        start("hangs", 2),
    ):
        pass


def test_one_with_another_model_is_refused(start):
    with pytest.raises(ServerError, match="serves another, not mine"), start("another"):
        pass


def test_one_that_dies_while_it_answers_is_not_waited_for(start):
    with pytest.raises(ServerError, match="the server ended with exit code 7"), start("dies later") as server:
        ask(server)


def test_one_that_answers_with_errors_is_quoted(start):
    with pytest.raises(EndpointError, match="no answer after 2 .*HTTP 500: out of memory"), start("fails") as server:
        ask(server)


def test_one_that_answers_nothing_is_given_up(start):
    with pytest.raises(EndpointError, match=r"no complete answer within 0.2 s|timed out"), start("silent") as server:
        ask(server, timeout=0.2)


@pytest.mark.slow  # waits until it is killed
def test_one_that_does_not_end_is_killed(start):
    with start("stubborn") as server:
        assert server.process.poll() is None
    assert server.process.poll() == -signal.SIGKILL


def test_a_port_that_is_taken_is_named(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} of 127.0.0.1 cannot be used: .*Choose another one"):
            require_free(port)
    missing = running(
        ["no-such-server"], port=free_port(), names=[], log=tmp_path / "log", environment=os.environ, seconds=1
    )
    with pytest.raises(ServerError, match="no-such-server could not be started"), missing:
        pass


def test_a_terminated_command_leaves_no_server(tmp_path: Path):
    """SIGTERM, as a scheduler sends it: the server and its child end too."""
    script = f"""
import os, sys
from pathlib import Path
from finetune.serving.process import free_port, running
port = free_port()
command = [sys.executable, "-c", {SERVER!r}, str(port), "works", "pids"]
with running(command, port=port, names=["mine"], log=Path("log"), environment=os.environ, seconds=600) as server:
    print("ready", flush=True)
    server.wait(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=-3) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        process.wait(LIMIT_S)
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        assert not is_alive(pid)
