"""The report that a real run leaves: of one that ends well in tests/ranks, of one whose rank is killed here."""

import json
import re
from pathlib import Path

from starts import toy_run
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
