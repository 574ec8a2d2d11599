"""lmms-eval is called for each model; its scores make one table, and its failures are not taken for scores."""

import json
import os
from pathlib import Path

import pytest
from process_table import write_program

from launchers.cli import main

PROGRAM = """
import json, os, pathlib, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
fault = os.environ["FAULT"]
assert os.environ["OPENAI_API_KEY"] == "none" and "PYTHONPATH" not in os.environ
print("loading", words["--tasks"])
if fault == "fails":
    sys.exit("ImportError: no module named av")
if fault == "writes nothing":
    sys.exit(0)
out = pathlib.Path(sys.argv[-1], "openai")
out.mkdir()
name = words["--model_args"].split(",")[0].removeprefix("model_version=")
(out / "words.json").write_text(json.dumps(sys.argv[1:]))
score = 0.25 if name == "mine-base" else 0.5
scores = {"alias": "a", "exact,none": score, "exact_stderr,none": "N/A", "samples": 2}
(out / "1_results.json").write_text(json.dumps({"results": {"pictures": scores}}))
answers = ["A wave.", "[LMMS_EVAL_REQUEST_FAILED after 5 retries] refused" if fault == "lost" else "A cross."]
lines = [json.dumps({"doc_id": at, "filtered_resps": [text] if at else text}) for at, text in enumerate(answers)]
(out / "1_samples_pictures.jsonl").write_text("\\n".join(lines) + "\\n")
"""
"""A program with lmms-eval's arguments and files."""

URL = "http://127.0.0.1:8000/v1"


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "lmms-eval"
    write_program(program, PROGRAM)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", "ours")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)

    def score(fault: str, *words: str) -> int:
        monkeypatch.setenv("FAULT", fault)
        return main(["harness", "pictures", "--model", f"mine-base@{URL}", "--model", f"mine@{URL}", *words])

    return score


def test_the_base_stands_beside_the_tuned_model(score, capsys) -> None:
    assert score("", "--tasks-folder", "tasks", "--limit", "5") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0][-3:] == ["mine-base", "mine", "change"]
    assert rows[1:] == [["pictures", "exact", "0.2500", "0.5000", "+0.2500"]]
    words = json.loads(Path("harness/2-mine/openai/words.json").read_text())
    told = dict(zip(words[::2], words[1::2], strict=False))
    assert told["--model_args"] == f"model_version=mine,base_url={URL},timeout=600,num_concurrent=8"
    assert (told["--tasks"], told["--include_path"], told["--limit"]) == ("pictures", "tasks", "5")
    assert score("") == 2
    assert "--out harness is not empty, and older scores there could be taken for new ones" in capsys.readouterr().err
    assert score("", "--out", "again", "--json") == 0
    assert [one["scores"] for one in json.loads(capsys.readouterr().out)] == [
        {"pictures exact": 0.25},
        {"pictures exact": 0.5},
    ]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("fails", "lmms-eval ended with exit code 1 and no results. The end of "),
        ("writes nothing", "lmms-eval ended with exit code 0 and no results. The end of "),
        ("lost", "1 request of 2 failed, and lmms-eval scored them as answers: [LMMS_EVAL_REQUEST_FAILED after 5"),
    ],
)
def test_a_failure_is_not_a_score(fault, message, score, capsys) -> None:
    assert score(fault) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"moetune harness: {message}" in printed.err
    assert ("ImportError: no module named av" in printed.err) == (fault == "fails")


def test_wrong_words_are_named(score, capsys) -> None:
    assert score("", "--program", "no-such-program") == 2
    assert (
        "no-such-program could not be started (No such file or directory): install lmms-eval" in capsys.readouterr().err
    )
    for model in ("mine", "mine@localhost:8000", f"a,b@{URL}"):
        assert score("", "--model", model) == 2
        assert f"--model {model!r}: write NAME@URL" in capsys.readouterr().err
