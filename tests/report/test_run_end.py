"""The reports of real runs, beside those that end well in tests/ranks: a killed rank's, and one that is watched."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from limits import LIMIT_S
from report_runs import write_run
from starts import environment, toy_run
from user_runs import TRAIN, start

KILLED_AT_A_RECORD = """
import os, signal, sys
steps = []
def at_its_record(event, arguments):
    if event == "open" and os.environ.get("RANK") == "0" and str(arguments[0]).endswith("metrics.jsonl"):
        steps.append(arguments[1])
        if steps.count("a") == 3:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(at_its_record)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_a_report_with_the_reason(tmp_path: Path) -> None:
    words = ["data.workers=0", "parallel.ep=1", "schedule.steps=5", "data.packs_per_step=2"]
    done = start(toy_run(tmp_path), TRAIN, "killed", *words, site=KILLED_AT_A_RECORD)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "report: runs/killed/report.html"
    page = (tmp_path / "runs" / "killed" / "report.html").read_text()
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    (run,) = json.loads(text)["runs"]
    assert run["state"]["word"] == "failed"
    assert run["state"]["message"].startswith("rank 0: killed by SIGKILL")
    assert run["curves"]["x"] == [0, 1]
    assert run["load"]["frames"] == [[0, 0, 1]]


HOLDS = """
import sys
from pathlib import Path
from finetune.checkpoint.run_lock import take_run
release = take_run(Path(sys.argv[1]), stall_seconds=600, say=print)
print("held", flush=True)
sys.stdin.read()
release()
"""


def test_a_watched_report_reloads_itself_until_the_run_ends(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine", outcome=None)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment()}
    watch = [sys.executable, "-m", "launchers.cli", "report", str(folder), "--watch", "--seconds", "1"]
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], **pipes) as run:
        assert run.stdout.readline() == "held\n"
        with subprocess.Popen(watch, **pipes) as watching:
            assert watching.stdout.readline() == f"{folder / 'report.html'}\n"
            page = (folder / "report.html").read_text()
            assert '<meta http-equiv="refresh" content="1">' in page
            assert '"state": {"word": "running"' in page
            run.stdin.close()
            assert watching.wait(LIMIT_S) == 0
    page = (folder / "report.html").read_text()
    assert 'http-equiv="refresh"' not in page
    assert '"state": {"word": "ended"' in page
