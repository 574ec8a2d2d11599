"""`moetune serve --run` ends in time, with one message, whatever is wrong with the server; no process is left."""

import copy
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_cases import WIDE, drawn_adapter
from bases import base
from chat_server import Server, serving
from media_files import encode, picture
from peft import PeftModel
from PIL import Image
from process_table import is_alive, write_program
from transformers import AutoModelForImageTextToText

from finetune.config import DensePartConfig, RouterPartConfig
from finetune.serving.process import free_port
from launchers.cli import main

VLLM = """
import json, os, subprocess, sys, time, urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
fault = os.environ["FAULT"]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(os.environ["PIDS"], "w").write(f"{os.getpid()} {child.pid}")
if fault == "dies":
    sys.exit("no backend supports it")
if fault == "hangs":
    time.sleep(600)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name = "another" if fault == "has another name" else "mine"
        self.send(200, json.dumps({"data": [{"id": name}]}).encode())
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if fault == "dies when asked":
            os._exit(7)
        if fault == "never answers":
            time.sleep(600)
        if fault == "answers 500":
            self.send(500, b'{"error": {"message": "out of memory"}}')
        else:
            self.send(200, urllib.request.urlopen(os.environ["UPSTREAM"] + self.path, body).read())
    def send(self, status, data):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *_):
        pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
"""A program called vllm. It hands questions to stock transformers and PEFT in the test's process, unless it fails."""

FAILS = {
    "dies": r"the server ended with exit code 1\. Its last lines, of .*\n  no backend supports it",
    "hangs": r"the server was not ready after 1 seconds \(.*refused.*\)",
    "has another name": "serves another, not mine",
    "dies when asked": "the server ended with exit code 7",
    "never answers": r"no answer after 2 attempts; the last failed with: .*(within 0\.3 s|timed out)",
    "answers 500": "no answer after 2 attempts; the last failed with: HTTP 500: out of memory",
}
DIFFERS = {
    "": "4 grids compared",
    "another model": "FAIL  log-probabilities",
    "other image limits": r"FAIL  image grids .*\n(.*\n)*.*the first: sample \S+, image grids: image or frame pair 1",
    "drops the adapter": "cause the server computes the base alone: it was started without the adapter, dropped it",
    "drops the experts": "cause the server leaves out the adapter's part experts: merge the adapter",
}
"""Faults in the results of a server, and the line of the card about each."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, with the held-out samples that its configuration names."""
    folder = tmp_path_factory.mktemp("run")
    servable = replace(WIDE, router=RouterPartConfig(mode="frozen"), vision_blocks=DensePartConfig())
    drawn_adapter(folder / "adapter", servable)
    rows = []
    for number in range(2):
        (folder / f"{number}.png").write_bytes(encode(Image.fromarray(picture(64, 96, number))))
        turns = [{"role": "user", "content": "<image>Or <image>?"}, {"role": "assistant", "content": "B"}]
        rows.append(json.dumps({"messages": turns, "images": [f"{number}.png"] * 2}) + "\n")
    (folder / "rows.jsonl").write_text("".join(rows))
    (folder / "config.yaml").write_text(f"eval: {{sources: {{rest: {{path: {folder / 'rows.jsonl'}}}}}}}\n")
    return folder


@pytest.fixture(scope="module")
def tuned(run: Path) -> torch.nn.Module:
    plain = AutoModelForImageTextToText.from_pretrained(base(), dtype=torch.float32)
    model: torch.nn.Module = PeftModel.from_pretrained(plain, run / "adapter").eval()
    return model


@pytest.fixture
def serve(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that runs the command with a fault; afterwards the proof that the server's processes are gone."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    write_program(program, VLLM)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    monkeypatch.chdir(tmp_path)
    limits = ["--start-seconds", "600", "--max-tokens", "4", "--tolerance", "0.001"]

    def serve(fault: str, *words: str) -> int:
        monkeypatch.setenv("FAULT", fault)
        return main(["serve", str(run), "--run", "--port", str(free_port()), *limits, *words])

    yield serve
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        assert not is_alive(pid)


@pytest.mark.parametrize("fault", FAILS)
def test_a_server_that_fails_is_named_and_ended(fault, serve, capsys) -> None:
    limit = {"hangs": ["--start-seconds", "1"], "never answers": ["--timeout", "0.3"]}.get(fault, [])
    assert serve(fault, *limit) == 1
    message = capsys.readouterr().err
    assert re.search(f"^moetune serve: .*{FAILS[fault]}", message, re.MULTILINE)
    assert message.count("moetune serve:") == 1


@pytest.mark.parametrize("wrong", DIFFERS)
def test_a_server_that_computes_something_else_is_named_and_ended(wrong, serve, tuned, capsys, monkeypatch) -> None:
    model = copy.deepcopy(tuned)
    with torch.no_grad():
        if wrong == "another model":
            model.base_model.model.lm_head.weight[7] *= 3
        for name, parameter in model.named_parameters():
            if "lora_B" in name and (
                wrong == "drops the adapter" or (wrong == "drops the experts" and "experts" in name)
            ):
                parameter.zero_()
    with serving(Server(base(), model)) as upstream:
        upstream.enlarge = 4 if wrong == "other image limits" else 1
        monkeypatch.setenv("UPSTREAM", upstream.url.removesuffix("/v1"))
        assert serve("") == (3 if wrong else 0)
    shown = capsys.readouterr().out
    assert re.search(DIFFERS[wrong], shown)
    assert re.search(r"\$ vllm serve .*\n.*\nready at http://127.0.0.1:\d+/v1\n", shown)
