"""Scores served models with lmms-eval, a program of its own, through the address at which they are served."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.format.printable import count_of
from finetune.ask.exchange import EndpointError

PROGRAM = "lmms-eval"
TESTED = "0.7.3"
_LOST = "[LMMS_EVAL_"
"""The beginning of the text that lmms-eval scores as an answer when a request has failed."""
_LAST_LINES = 12


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model by its name at a server, and the server's address up to /v1."""

    name: str
    url: str


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Results of one model: a value for each task and metric, and each answer by task and number of the question."""

    values: Mapping[str, float]
    answers: Mapping[tuple[str, int], str]


def served_model(word: str) -> ServedModel:
    """Read NAME@URL."""
    name, _, url = word.rpartition("@")
    if not name or not url.startswith(("http://", "https://")) or set(",=") & set(word):
        raise ValueError(
            f"--model {word!r}: write NAME@URL, such as mine@http://localhost:8000/v1, without a comma or ="
        )
    return ServedModel(name=name, url=url)


def command(
    program: str,
    model: ServedModel,
    tasks: Sequence[str],
    out: Path,
    *,
    tasks_folder: Path | None = None,
    limit: int | None = None,
    timeout: float = 600.0,
    concurrency: int = 8,
) -> list[str]:
    """Return the words that score one model."""
    settings = f"model_version={model.name},base_url={model.url},timeout={timeout:g},num_concurrent={concurrency}"
    words = [program, "--model", "openai", "--model_args", settings, "--tasks", ",".join(tasks), "--batch_size", "1"]
    words += ["--include_path", str(tasks_folder)] if tasks_folder is not None else []
    words += ["--limit", str(limit)] if limit is not None else []
    return [*words, "--log_samples", "--output_path", str(out)]


def score(words: Sequence[str], out: Path, environment: Mapping[str, str]) -> Scores:
    """Run lmms-eval and return what it wrote below `out`; raise EndpointError if it failed, or a request did."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    with log.open("wb") as output:
        try:
            # it asks for a key even of a server that wants none
            done = subprocess.run(
                words,
                env={"OPENAI_API_KEY": "none", **environment, "NO_COLOR": "1"},
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
            )
        except OSError as error:
            raise ValueError(
                f"{words[0]} could not be started ({error.strerror}): install lmms-eval {TESTED} and filelock<4 in "
                f"an environment of their own, and name the program with --program"
            ) from error
    if done.returncode or not _reports(out):
        last = "".join(f"\n  {line}" for line in log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
        raise EndpointError(f"lmms-eval ended with exit code {done.returncode} and no results. The end of {log}:{last}")
    scores = read_scores(out)
    lost = [text for text in scores.answers.values() if text.startswith(_LOST)]
    if lost:
        raise EndpointError(
            f"{count_of(len(lost), 'request')} of {len(scores.answers)} failed, and lmms-eval scored them as answers: "
            f"{lost[0]}"
        )
    return scores


def read_scores(out: Path) -> Scores:
    """Return the scores and answers that lmms-eval wrote below a folder."""
    return Scores(values=_values(json.loads(_reports(out)[-1].read_text())), answers=_answers(out))


def _reports(out: Path) -> list[Path]:
    return sorted(out.rglob("*_results.json"))


def _values(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of a report, without their standard errors."""
    values = {}
    for task, scores in report["results"].items():
        for name, value in scores.items():
            metric = name.partition(",")[0]
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and not re.search("stderr|samples", metric)
            ):
                values[f"{task} {metric}"] = float(value)
    return values


def _answers(out: Path) -> dict[tuple[str, int], str]:
    """Return each answer by its task and the number of its question."""
    answers = {}
    for path in sorted(out.rglob("*_samples_*.jsonl")):
        task = path.stem.partition("_samples_")[2]
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            found = sample["filtered_resps"]
            answers[task, int(sample["doc_id"])] = found if isinstance(found, str) else str(found[0])
    return answers


def table(names: Sequence[str], scores: Sequence[Scores]) -> list[str]:
    """Return a row for each task and metric, a column for each model, and the change from the first to the last."""
    several = len(names) > 1
    titles = ["task and metric", *names, *(["change"] if several else [])]
    rows = [titles]
    for key in scores[0].values:
        found = [one.values[key] for one in scores]
        rows.append([key, *(f"{value:.4f}" for value in found), *([f"{found[-1] - found[0]:+.4f}"] if several else [])])
    widths = [max(len(row[at]) for row in rows) for at in range(len(titles))]
    return ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def here() -> dict[str, str]:
    """Return the variables under which the program runs: ours, without the path to our own modules."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
