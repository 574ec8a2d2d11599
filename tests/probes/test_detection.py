"""The benchmarks of probes and cards: their questions, how they resume, and the proof of one probe."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.__main__ import main as benchmark
from benchmarks.cards.command import missing
from benchmarks.cards.record import PARTS, Card, Numbers, card_rows, gain_lines
from benchmarks.cards.record import keep_numbers as keep_cards
from benchmarks.cards.record import read_numbers as read_cards
from benchmarks.cards.tasks import BASE, TASKS
from benchmarks.harness.tiny_runs import write_rows
from benchmarks.probes import record as probes
from benchmarks.probes.cases import CASES
from benchmarks.probes.detect import FIRST, detect
from benchmarks.probes.record import DeadExpert, Detection, keep_numbers, read_numbers
from data.prepare.converted import shards_of_rows
from data.rows.files import RowSource
from finetune.ask.scores import find_metric

CARD = Card(
    task="digits",
    parts="attention",
    seed=0,
    metric="exact",
    about="handwritten digits",
    before=0.1,
    after=0.6,
    kept_before=0.9,
    kept_after=0.5,
    trained=100,
    steps=70,
    seconds=30.0,
)


def test_training_questions_are_made_from_their_numbers_and_become_shards(tmp_path: Path) -> None:
    draws = [case.draw for case in CASES] + [task.draw for task in TASKS] + [*BASE]
    for draw in draws:
        assert draw(FIRST + 1) == draw(FIRST + 1)
        assert len({draw(FIRST + number).answer for number in range(12)}) > 1
    write_rows(tmp_path / "rows.jsonl", [draw(FIRST + number) for number, draw in enumerate(draws)])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["messages"][-1]["role"] for row in rows] == ["assistant"] * len(draws)
    assert len(shards_of_rows(RowSource(path=tmp_path / "rows.jsonl"), "rows", cache_dir=None, jobs=1)) == 1, (
        "and no row is refused"
    )


def test_each_reference_of_a_task_scores_one() -> None:
    for task in TASKS:
        measure = find_metric(task.metric)
        answers = [task.draw(number).answer for number in range(8)]
        assert [measure(answer, [answer]) for answer in answers] == [1.0] * 8


def test_what_is_recorded_is_not_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "probes.json"
    found = [
        Detection(
            probe=case.probe,
            seed=seed,
            about="",
            columns=("on", "off"),
            having=0.9,
            lacking=0.2,
            seconds=60.0,
            scores=[],
        )
        for case in CASES
        for seed in (0, 1, 2)
    ]
    dead = [DeadExpert(seed=seed, layer=1, expert=3, before=[[], []], named=[[], [3]]) for seed in (0, 1, 2)]
    keep_numbers(probes.Numbers(detections=found, dead=dead), path)
    assert benchmark(["probes", "--results", str(path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(found) + len(dead)
    assert read_numbers(path) == probes.Numbers(detections=found, dead=dead)
    for blind in ([replace(found[0], lacking=0.7), *found[1:]], found):
        unnamed = dead if blind != found else [replace(dead[0], named=[[], []]), *dead[1:]]
        keep_numbers(probes.Numbers(detections=blind, dead=unnamed), path)
        assert benchmark(["probes", "--results", str(path)]) == 1


def test_cards_are_trained_seed_by_seed_and_the_time_is_said_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [job.name for job in missing(Numbers(cards=[], bases=[]), tmp_path)]
    assert names[:2] == ["base, as is, seed 0", "digits, LoRA on attention, seed 0"]
    assert len(names) == 3 * (1 + len(TASKS) * len(PARTS)) + 3 * 2
    keep_cards(Numbers(cards=[CARD], bases=[]), tmp_path / "cards.json")
    again = [job.name for job in missing(read_cards(tmp_path / "cards.json"), tmp_path)]
    assert again == [name for name in names if name != "digits, LoRA on attention, seed 0"]
    words = ["cards", "--minutes", "-1", "--work", str(tmp_path), "--results", str(tmp_path / "cards.json")]
    assert benchmark(words) == 0
    printed = capsys.readouterr().out
    assert "62 trainings are missing, about 102 minutes on one free core; stops after -1 minutes" in printed


def test_a_card_says_where_experts_gain_nothing() -> None:
    cards = [
        CARD,
        replace(CARD, parts="experts", after=0.62),
        replace(CARD, parts="both", after=0.58),
        replace(CARD, task="boxes"),
        replace(CARD, task="boxes", parts="experts", after=0.9),
        replace(CARD, task="boxes", parts="both", after=0.8),
        replace(CARD, task="text"),
    ]
    assert gain_lines(cards) == [
        "- digits: adapting experts, alone or with attention, gains nothing (the difference is +0.02).",
        "- boxes: adapting experts, alone or with attention, gains 0.30.",
    ]
    assert card_rows([CARD, replace(CARD, seed=1, after=0.8)])[0][2:5] == [
        "2",
        "0.10 (0.10 to 0.10)",
        "0.70 (0.60 to 0.80)",
    ]


@pytest.mark.slow
def test_a_tiny_model_learns_the_order_of_colours_and_the_probe_sees_it(tmp_path: Path) -> None:
    (case,) = (case for case in CASES if case.probe == "order")
    found = detect(case, seed=5, folder=tmp_path)
    assert found.having >= 0.8
    assert found.difference >= 0.3
