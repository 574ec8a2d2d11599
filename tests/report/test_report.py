"""The report of a run: its numbers by hand, bounded size, hostile texts, damaged records, and the list of runs."""

import json
import re
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_runs import HOSTILE, fail, write_run

from finetune.report.curves import buckets_of
from finetune.report.files import read_run_files, spread_lines
from finetune.report.load import EVEN
from finetune.report.page import MOST_BYTES, Room, try_report, write_report
from launchers.cli import main


def content(path: Path) -> dict[str, Any]:
    """Return the data in a report, as the browser reads it."""
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


def test_a_run_is_shown_with_its_numbers(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine")
    (run,) = content(write_report([folder]))["runs"]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert run["state"] == {"word": "done", "message": ""}
    assert (run["name"], run["done"], run["steps"]) == ("mine", 12, 12)
    assert run["curves"]["x"] == list(range(12))
    assert run["curves"]["figures"]["loss"] == pytest.approx([step["loss"] for step in metrics], rel=1e-4)
    assert run["curves"]["bands"] == {}
    rates = run["curves"]["rates"]
    assert rates["merger"][1] == pytest.approx(1e-5)
    assert rates["attention"][0] == pytest.approx(rates["attention"][1] / 2, rel=1e-4)  # it warms up
    documents = run["sources"][0]
    assert (documents["name"], documents["path"], documents["licences"]) == (
        "documents",
        "0.jsonl",
        "CC-BY-4.0, not stated",
    )
    assert (documents["samples"], documents["tokens"], documents["share"]) == (20, 2000, 0.5)
    assert documents["first"] == pytest.approx(np.mean([step["loss"] for step in metrics[:2]]))
    assert documents["last"] == pytest.approx(np.mean([step["loss"] for step in metrics[-2:]]))
    assert run["evaluation"]["best"] == {"metric": "documents/loss", "value": 2.0, "step": 12}
    assert run["evaluation"]["guards"]["documents"] == {"guard": "flag", "max_kl": 0.5, "max_loss_rise": 0.1}
    assert run["evaluation"]["sources"]["charts"]["kl"] == [0.0, 0.5, 1.0]
    assert dict(run["phases"]) == {
        "start": 3.0,
        "steps, computing": pytest.approx(4.8),
        "steps, waiting for data": pytest.approx(1.2),
        "evaluations": 0.75,
        "checkpoints": 1.0,
        "result": 1.0,
    }
    assert run["memory"][0] == {"name": "weights on rank 0", "plan": "1.0 kB", "measured": "1.0 kB"}
    assert run["answers"]["rows"][0] | {"key": ""} == {
        "source": "documents",
        "key": "",
        "question": "It is red.",
        "wanted": "It is red.",
        "before": "?",
        "after": "It is red.",
    }
    assert run["samples"][0]["parts"][1] == ["It is red.", True]
    assert run["samples"][0]["pictures"][0].startswith("data:image/jpeg;base64,")
    assert run["keys"]["eval.metric"] == '"documents/loss"'


def test_the_load_of_all_records_is_in_the_frames(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine", steps=400, load_every=1)
    (run,) = content(write_report([folder]))["runs"]
    load = run["load"]
    records = [json.loads(line) for line in (folder / "expert_load.jsonl").read_text().splitlines()]
    assert sum(count for _, _, count in load["frames"]) == 400
    assert (load["frames"][0], load["frames"][-1][1]) == ([0, 6, 7], 399)
    assert [view["name"] for view in load["views"]] == ["all tokens", "text", "image", "documents", "charts"]
    for view, pick in (
        (load["views"][0], lambda record: record["counts"]),
        (load["views"][2], lambda record: record["kinds"]["image"]),
    ):
        counts = np.sum([pick(record) for record in records[:7]], axis=0)
        levels = np.frombuffer(b64decode(view["data"][0]), np.uint8).reshape(counts.shape)
        assert np.abs(levels - counts / counts.mean(1, keepdims=True) * EVEN).max() <= 0.5
        assert (levels == 0).tolist() == (counts == 0).tolist()
        total = np.sum([pick(record) for record in records], axis=0)
        assert view["peak"] == pytest.approx((total.max(1) / total.mean(1)).max())
        assert view["dead"] == 3
    assert sum(view["share"] for view in load["views"][1:3]) == pytest.approx(1)


def test_a_long_run_fits_and_loses_no_extreme(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "long", steps=10_000, experts=64, layers=12, load_every=20)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics[4321]["loss"] = 99.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in metrics))
    path = write_report([folder])
    assert path.stat().st_size <= MOST_BYTES
    curves = content(path)["runs"][0]["curves"]
    assert len(curves["x"]) <= Room.of(1).points
    assert max(curves["bands"]["loss"][1]) == 99.0
    assert curves["figures"]["loss"][0] == pytest.approx(
        np.mean([step["loss"] for step in metrics[: curves["width"]]]), rel=1e-4
    )
    several = write_report([folder] * 6, tmp_path / "several.html")
    assert several.stat().st_size <= MOST_BYTES


def test_parts_shrink_until_the_report_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "mine", steps=3000)
    large = write_report([folder]).stat().st_size
    monkeypatch.setattr("finetune.report.page.MOST_BYTES", large - 100_000)
    assert write_report([folder]).stat().st_size <= large - 100_000


@pytest.mark.parametrize("outcome", ["done", "preempted", "guarded", None])
def test_the_state_of_a_run_is_that_of_its_last_start(tmp_path: Path, outcome: str | None) -> None:
    folder = write_run(tmp_path / "mine", outcome=outcome)
    (run,) = content(write_report([folder]))["runs"]
    assert run["state"]["word"] == (outcome or "ended")
    labels = [command["label"] for command in run["commands"]]
    assert ("continue" in labels) == (outcome != "done")


def test_the_log_becomes_events(tmp_path: Path) -> None:
    log = [
        "warning: disk is slow",
        "left out: source a, shard b, sample c: broken",
        "stopped by SIGTERM after 3 steps; the same command continues from there",
        "resumed: runs/x/checkpoints/step-000003, saved by 2 ranks; 9 steps to go",
        "from step 5, stage grown: attention train",
        "guard counts: KL(base || tuned) is 0.6, above 0.5",
        "an ordinary message",
        *["warning: again"] * 300,
    ]
    folder = write_run(tmp_path / "mine", log=log)
    events = content(write_report([folder]))["runs"][0]["events"]
    kinds = ["warning", "bad sample", "preempted", "resumed", "stage", "guard", "warning"]
    assert [event["kind"] for event in events["shown"][:7]] == kinds
    assert (len(events["shown"]), events["left_out"]) == (200, 106)
    assert events["counts"]["warning"] == 301


def test_no_text_of_data_ends_the_script_that_holds_it(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "|")
    folder = write_run(tmp_path / name, text=HOSTILE, sources=(HOSTILE, "__proto__"), log=[f"warning: {HOSTILE}"])
    fail(folder, HOSTILE)
    (folder / "logs" / "outcome.json").unlink()
    path = write_report([folder])
    page = path.read_text()
    assert page.count("<script") == 2
    assert page.count("</script>") == 2
    assert "<img" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    decoded = json.dumps(content(path), ensure_ascii=False)
    assert re.findall(r"\u202e|(?<!\\)\\u001b", decoded) == []
    (run,) = content(path)["runs"]
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert run["samples"][0]["parts"][1][0] == shown
    assert run["state"]["message"] == f"rank 1: {shown}"
    assert run["sources"][0]["name"] == shown


def test_damaged_records_are_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine")
    whole = content(write_report([folder]))["runs"][0]["curves"]
    for name in ("metrics", "expert_load", "evaluations", "predictions", "samples", "starts"):
        with (folder / f"{name}.jsonl").open("ab") as file:
            file.write(b'\xff\xfe\n[1]\n{"loss": 3}\n{"step": "1"}\n{"step": 1, "counts": [[1], [2, 3]]}\n{"ste')
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    (folder / "metrics.jsonl").write_bytes(b"\n".join(line for line in lines if b"counts" not in line))
    assert content(write_report([folder]))["runs"][0]["curves"]["x"] == whole["x"]
    for name in ("config.yaml", "plan.json"):
        (folder / name).write_bytes(b"\x00{[")
    (folder / "media" / "step-000000-0.png").write_bytes(b"no picture")
    (run,) = content(write_report([folder]))["runs"]
    assert run["keys"] == {}
    assert run["samples"][0]["pictures"] == []


def test_a_report_never_fails_a_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine")
    assert try_report(folder) == f"report: {folder / 'report.html'}"
    (folder / "report.html").unlink()
    (folder / "report.html.partial").mkdir()
    assert re.match(
        rf"warning: no report was written \(IsADirectoryError: .*`moetune report {folder}`", try_report(folder)
    )
    assert "is not the folder of a run: it has neither config.yaml nor metrics.jsonl" in try_report(tmp_path)


def test_a_large_file_is_read_in_part_but_over_its_whole_length(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("".join(f"{number:07d}\n" for number in range(100_000)))
    read = [int(line) for line in spread_lines(path, 80_000)]
    assert 9_000 <= len(read) <= 11_000
    assert (read[0], read[-1]) == (0, 99_999)
    assert max(np.diff(read)) < 30
    assert list(spread_lines(path, 800_000)) == path.read_bytes().splitlines(keepends=True)
    assert list(spread_lines(tmp_path / "absent")) == []


def test_a_bucket_is_a_weighted_mean_of_what_is_known() -> None:
    buckets = buckets_of(5, 3)
    values = np.array([1.0, 3.0, np.nan, 5.0, np.nan])
    assert (list(buckets.starts), buckets.width) == ([0, 2, 4], 2)
    np.testing.assert_array_equal(buckets.mean(values), [2.0, 5.0, np.nan])
    np.testing.assert_array_equal(buckets.mean(values, np.array([3.0, 1.0, 1.0, 1.0, 1.0])), [1.5, 5.0, np.nan])


def test_several_runs_show_the_keys_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "one", config={"optim": {"lr": 1e-4}})
    other = write_run(tmp_path / "other", config={"optim": {"lr": 2e-4}, "stages": {"a": {"lr": None}}}, experts=None)
    out = tmp_path / "both.html"
    assert main(["report", str(one), str(other), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    both = content(out)
    assert both["differing"] == [["optim.lr", ["0.0001", "0.0002"]]]
    assert [run["load"] is None for run in both["runs"]] == [False, True]


def test_runs_are_listed_with_their_state_and_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "fine")
    broken = write_run(tmp_path / "broken", steps=4, outcome=None, evaluates=False)
    fail(broken, "CUDA error: \x1b[31muncorrectable\nThe GPU has failed.")
    (tmp_path / "other").mkdir()
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "step", "best", "metric", "base", "size"]
    table = "\n".join(lines)
    assert re.search(r"^fine +done +12 of 12 +documents/loss 2, step 12 +base +\d+\.\d kB$", table, re.MULTILINE)
    assert re.search(
        r"^broken +failed +4 of 4 +- +base .*\n  rank 1: CUDA error: \\x1b\[31muncorrectable$", table, re.MULTILINE
    )
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("folder", "text"), [("empty", "has no runs: none of its folders"), ("absent", "is not a folder")]
)
def test_a_folder_without_runs_is_named(
    tmp_path: Path, folder: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path / folder)]) == 2
    assert text in capsys.readouterr().err


def test_files_of_a_run_that_has_only_begun(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "config.yaml").write_text("run: {name: new}\n")
    assert read_run_files(folder).done == 0
    (run,) = content(write_report([folder]))["runs"]
    assert (run["tiles"], run["curves"]["x"], run["load"]) == ([], [], None)
