"""Scores the same questions by lmms-eval and by `moetune eval`, at one live server, the base beside the tuned model.

The task is in lmms-eval's own format: a YAML file, the functions that it names, and rows. Nothing is downloaded.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.serving.cases import PICTURES, Case, Outcome
from benchmarks.serving.environments import Environment
from benchmarks.serving.material import moetune
from benchmarks.serving.proof import NAME, TOKENS, Proof
from benchmarks.serving.record import CONTROL, Cell
from finetune.serving.harness import read_scores
from finetune.serving.process import Server

TASK = "moetune_pictures"
METRIC = "exact"
YAML = f"""\
task: {TASK}
dataset_path: json
dataset_kwargs: {{{{data_files: {{{{test: {{rows}}}}}}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.images
doc_to_text: !function pictures.question
doc_to_target: answer
process_results: !function pictures.exact
generation_kwargs: {{{{max_new_tokens: {TOKENS}, temperature: 0}}}}
metric_list:
  - {{{{metric: {METRIC}, aggregation: mean, higher_is_better: true}}}}
"""
FUNCTIONS = f"""\
from PIL import Image


def images(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def exact(doc, results):
    return {{"{METRIC}": float(results[0].strip() == doc["answer"])}}
"""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The mean score of a model, and its answers in the order of the questions."""

    score: float
    answers: tuple[str, ...]


def harness_cells(harness: Environment, proof: Proof) -> Iterator[Cell]:
    """Serve a base with an adapter on it, score both twice, and yield a cell for each, with its control."""
    version = harness.version("lmms-eval")
    with proof.running(Case(name=TASK, base="dense", tuned=PICTURES, form="adapter")) as server:
        theirs, ours = _by_lmms_eval(harness, proof, server), _by_eval(proof, server)
    for name, label, other in ((f"{NAME}-base", "base", NAME), (NAME, "tuned", f"{NAME}-base")):
        case = f"scores of the {label} model, served by {proof.server}"
        cell = Cell(server="lmms-eval", version=version, case=case, outcome="equal", expected="equal")
        yield replace(cell, outcome=_outcome(theirs[name], ours[name]), reason=_said(theirs[name], ours[name]))
        yield replace(
            cell,
            case=f"{CONTROL}{case}",
            outcome=_outcome(theirs[name], ours[other]),
            expected="differs",
            reason=f"control, the other model: {_said(theirs[name], ours[other])}",
        )


def _by_lmms_eval(harness: Environment, proof: Proof, server: Server) -> Mapping[str, Judged]:
    """Return what lmms-eval finds, by the one command that docs/serving.md shows."""
    folder = proof.material.folder / "harness"
    shutil.rmtree(folder, ignore_errors=True)
    rows = _write_task(folder / "tasks", proof.material.rows()["images"])
    names = (f"{NAME}-base", NAME)
    models = [word for name in names for word in ("--model", f"{name}@{server.url}")]
    files = ("--tasks-folder", str(rows.parent), "--out", str(folder / "scores"))
    moetune(
        "harness",
        TASK,
        *models,
        *files,
        "--program",
        harness.folder / "bin" / "lmms-eval",
        variables=harness.variables() | {"HF_HOME": str(folder / "cache")},
    )
    found = {}
    for number, name in enumerate(names, start=1):
        scores = read_scores(folder / "scores" / f"{number}-{name}")
        answers = [text for _, text in sorted(scores.answers.items())]
        found[name] = Judged(score=scores.values[f"{TASK} {METRIC}"], answers=tuple(answers))
    return found


def _write_task(folder: Path, rows: Path) -> Path:
    """Write the task for our rows about pictures; return its YAML file."""
    folder.mkdir(parents=True)
    docs = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        asked, answered = row["messages"]
        question = asked["content"].removeprefix("<image>")
        docs.append({"question": question, "answer": answered["content"], "image": str(rows.parent / row["images"][0])})
    (folder / "rows.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "pictures.py").write_text(FUNCTIONS)
    (folder / "pictures.yaml").write_text(YAML.format(rows=folder / "rows.jsonl"))
    return folder / "pictures.yaml"


def _by_eval(proof: Proof, server: Server) -> Mapping[str, Judged]:
    """Return what `moetune eval` finds."""
    rows, found = proof.material.rows()["images"], {}
    for name in (f"{NAME}-base", NAME):
        out = proof.material.folder / "harness" / f"{name}.jsonl"
        words = ("--url", server.url, "--name", name, "--metric", METRIC, "--max-tokens", str(TOKENS))
        report = json.loads(moetune("eval", rows, *words, "--out", out, "--json"))
        lines = sorted(map(json.loads, out.read_text().splitlines()), key=lambda line: str(line["key"]))
        found[name] = Judged(
            score=report["rows"][-1]["scores"][METRIC], answers=tuple(line["answer"] for line in lines)
        )
    return found


def _outcome(theirs: Judged, ours: Judged) -> Outcome:
    return "equal" if theirs == ours else "differs"


def _said(theirs: Judged, ours: Judged) -> str:
    same = sum(first == second for first, second in zip(theirs.answers, ours.answers, strict=True))
    scores = f"{METRIC} {theirs.score:.2f} by lmms-eval, {ours.score:.2f} by moetune eval"
    return f"{scores}, {same} of {len(ours.answers)} answers equal"
