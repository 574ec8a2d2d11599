"""Each metric compared with values computed by hand and, if there is one, with the published definition."""

import math
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.ask.overlaps import box_iou, find_boxes
from finetune.ask.scores import METRICS, anls, chosen_letter, find_json, find_metric, json_field_f1, levenshtein, spoken

BY_HAND = [
    # exact: except for white space and Unicode composition
    ("exact", " 7\n", ["7"], 1),
    ("exact", "cafe\u0301", ["café"], 1),
    ("exact", "Horse", ["horse"], 0),
    ("exact", "7", ["6", "7"], 1),
    # contains: whole words, upper or lower case
    ("contains", "It is a Horse.", ["horse"], 1),
    ("contains", "19", ["9"], 0),
    ("contains", "C++ it is", ["c++"], 1),
    ("contains", "anything", [""], 0),
    # choice
    ("choice", "B", ["B"], 1),
    ("choice", "(b) a horse", ["B. a horse"], 1),
    ("choice", "The answer is: **C**.", ["C"], 1),
    ("choice", "Option A is wrong, the answer is B", ["B"], 1),
    ("choice", "A horse", ["A"], 0),
    ("choice", "A or B", ["A"], 0),
    ("choice", "I think it is D", ["D"], 1),
    ("choice", "a horse", ["A"], 0),
    ("choice", "none", ["A"], 0),
    # f1: SQuAD's; 2 of 3 and 2 of 2 words -> 0.8
    ("f1", "the big brown horse", ["A brown, horse!"], 0.8),
    ("f1", "the", ["an"], 1),
    ("f1", "", ["horse"], 0),
    ("f1", "cat", ["dog", "the cat"], 1),
    # anls: 1 - 1/6; a distance of one half or more scores 0; the best of several references counts
    ("anls", "kitten", ["Sitten"], 1 - 1 / 6),
    ("anls", "ab", ["ac"], 0),
    ("anls", " 5  pm", ["5 PM", "17:00"], 1),
    # relaxed: within 5 % of the reference; text in lower case; per cent as in pix2struct
    ("relaxed", "104.9", ["100"], 1),
    ("relaxed", "105.1", ["100"], 0),
    ("relaxed", "50%", ["0.51"], 1),
    ("relaxed", "0", ["0"], 1),
    ("relaxed", "0.01", ["0"], 0),
    ("relaxed", "Blue", ["blue"], 1),
    # a box of 2 x 2 and the same box shifted by half its width: 2 / 6
    ("iou@0.3", "[0, 0, 2, 2]", ["[1, 0, 3, 2]"], 1),
    ("iou@0.34", "[0, 0, 2, 2]", ["[1, 0, 3, 2]"], 0),
    ("iou@0.5", '{"bbox_2d": [10, 10, 20, 20]}', ["(10, 10, 20, 21)"], 1),
    ("iou@0.5", "no box", ["[1, 0, 3, 2]"], 0),
    # two expected, one found twice: one of the two pairs; three given, two expected
    ("iou@0.5", "[0,0,1,1] [0,0,1,1]", ["[0,0,1,1] [5,5,6,6]"], 1 / 2),
    ("iou@0.5", "[5,5,6,6] [0,0,1,1] [8,8,9,9]", ["[0,0,1,1] [5,5,6,6]"], 2 / 3),
    ("point-in-box", "(15, 15)", ["[10, 10, 20, 20]"], 1),
    ("point-in-box", "(25, 15)", ["[10, 10, 20, 20]"], 0),
    ("point-in-box", "[14, 14, 16, 30]", ["[10, 10, 20, 20]"], 0),  # the centre is (15, 22)
    ("point-in-box", "[14, 14, 16, 20]", ["[10, 10, 20, 20]"], 1),
    ("point-in-box", "there", ["[10, 10, 20, 20]"], 0),
    # fields: a sum and two items are expected, and the sum and one item are right: 2 * 2 / (3 + 3)
    ("json-field-f1", '```\n{"sum": "3.50", "of": ["Tea", "jam"]}\n```', ['{"Sum": 3.5, "of": ["tea", "bun"]}'], 2 / 3),
    ("json-field-f1", '{"a": {"b": true}}', ['{"a": {"b": true}}'], 1),
    ("json-field-f1", '{"a": 1}', ['{"a": true}'], 0),
    ("json-field-f1", "no object", ['{"a": 1}'], 0),
    ("json-field-f1", '{"a": ' + "9" * 400 + "}", ['{"a": 1}'], 0),  # too large for a float
    ("json-field-f1", '{"a": ' + "9" * 5000 + "}", ['{"a": 1}'], 0),  # too long for Python's int parser
    # spans: 2 s of 5 s
    ("time-iou", "from 2 to 5 seconds", ["<3.0 seconds> to <7.0 seconds>"], 2 / 5),
    ("time-iou", "00:01:00 - 00:01:30", ["60 to 90"], 1),
    ("time-iou", "1:05 until 1:15", ["[65.0, 70.0]"], 1 / 2),
    ("time-iou", "at 3", ["2 to 5"], 0),
    ("time-iou@0.5", "1:05 until 1:15", ["[65.0, 70.0]"], 1),
    ("time-iou@0.6", "1:05 until 1:15", ["[65.0, 70.0]"], 0),
]


@pytest.mark.parametrize(("name", "answer", "references", "score"), BY_HAND)
def test_scores_equal_values_computed_by_hand(name: str, answer: str, references: list[str], score: float) -> None:
    assert find_metric(name)(answer, references) == pytest.approx(score)


def test_every_metric_is_tested_by_hand() -> None:
    assert {name.partition("@")[0] for name, *_ in BY_HAND} == {name.partition("@")[0] for name in METRICS}


@given(st.text("abc d", max_size=9), st.text("abc d", max_size=9))
@settings(max_examples=80, deadline=None)
def test_levenshtein_is_the_recursive_definition(one: str, two: str) -> None:
    from functools import cache

    @cache
    def far(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(far(i - 1, j) + 1, far(i, j - 1) + 1, far(i - 1, j - 1) + (one[i - 1] != two[j - 1]))

    assert levenshtein(one, two) == far(len(one), len(two))


numbers = st.integers(0, 8).map(float)
boxes = st.tuples(numbers, numbers, st.integers(1, 5), st.integers(1, 5)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@given(boxes, boxes)
@settings(max_examples=80, deadline=None)
def test_iou_counts_unit_squares(one: tuple, two: tuple) -> None:
    def cells(b: tuple) -> set:
        return {(x, y) for x in range(int(b[0]), int(b[2])) for y in range(int(b[1]), int(b[3]))}

    assert box_iou(one, two) == pytest.approx(len(cells(one) & cells(two)) / len(cells(one) | cells(two)))


@given(st.lists(boxes, max_size=4), st.lists(boxes, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_boxes_are_matched_as_well_as_any_pairing_can(answered: list, expected: list) -> None:
    from itertools import permutations

    spare = [*answered, *[None] * len(expected)]
    best = max(
        sum(one is not None and box_iou(one, other) >= 0.3 for one, other in zip(order, expected, strict=False))
        for order in permutations(spare, len(expected))
    )
    score = find_metric("iou@0.3")(" ".join(map(str, map(list, answered))), [" ".join(map(str, map(list, expected)))])
    assert score == pytest.approx(best / max(len(answered), len(expected)))


def test_boxes_letters_and_json_are_read_from_model_answers() -> None:
    assert find_boxes("[[3, 4, 1, 2.5]]") == [(1, 2.5, 3, 4)]
    assert find_json('so {x} and {"a": [1]} {"b": 2}') == {"a": [1]}
    assert find_json("[" * 100_000) is None
    assert spoken("<think>\nB?\n</think>\n\nC\n") == "C"
    assert chosen_letter("Answer: b.") == "B"
    assert chosen_letter("I.") == "I"


def test_a_user_metric_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metrics.py").write_text(
        "def close(a, r): return abs(float(a) - float(r[0])) < 1\nwrong = lambda a, r: 2\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert find_metric("my_metrics:close")("3.5", ["3"]) == 1.0
    with pytest.raises(ValueError, match="my_metrics:wrong gave 2 for the answer '3'; a score must be from 0 to 1"):
        find_metric("my_metrics:wrong")("3", ["3"])
    with pytest.raises(ValueError, match="has no attribute 'far'. Write module:function"):
        find_metric("my_metrics:far")
    with pytest.raises(ValueError, match="No module named 'nowhere'"):
        find_metric("nowhere:f")
    del sys.modules["my_metrics"]


def test_endless_answers_are_scored_too() -> None:
    """Score deep brackets, and lengths at which a table of all pairs would have 40 million entries."""
    for depth in (400, 900, 5000):
        deep = "[" * depth + "1" + "]" * depth
        assert json_field_f1(deep, ['{"a": 1}']) == 0.0
    assert json_field_f1("[" * 900 + "1" + "]" * 900, ["[" * 900 + "1" + "]" * 900]) == 1.0
    assert anls("abcd" * 5000, ["abcd" * 5000]) == 1.0
    assert anls("abcd" * 1500, ["abcx" * 1500]) == 0.75
    assert anls("a" * 10**6, ["a"]) == 0.0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bleu", "--metric 'bleu' is not known; use exact, contains"),
        ("iou", "--metric 'iou' is not known"),
        ("exact@0.5", "--metric 'exact@0.5' is not known"),
        ("iou@1.5", "after @ there must be an overlap above 0 and at most 1, for instance iou@0.5"),
        ("iou@x", "after @ there must be an overlap"),
    ],
)
def test_an_unknown_metric_is_refused(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        find_metric(name)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("choice", "letter of an option"),
        ("iou@0.5", r"box \[x1, y1, x2, y2\]"),
        ("point-in-box", "box"),
        ("json-field-f1", "JSON object or list"),
        ("time-iou", "pair of times"),
    ],
)
def test_a_reference_that_the_metric_cannot_measure_is_refused(name: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=rf"the reference \['a horse'\] contains no {wanted}"):
        find_metric(name)("[1, 2, 3, 4] {} 1 2", ["a horse"])


def test_no_score_is_ever_outside_its_range() -> None:
    for name in ("exact", "contains", "f1", "anls", "relaxed"):
        for answer in ("", " ", "nan", "inf", "1e999", "\u0301"):
            for reference in ("0", "nan", "inf", "1e999", "x"):
                score = find_metric(name)(answer, [reference])
                assert 0 <= score <= 1
                assert not math.isnan(score)
