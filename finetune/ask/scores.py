"""Scores answers from 0 to 1, by published definitions where they exist. Pure Python, no torch.

A metric takes the answer and the accepted references; with several references the best one counts. The caller removes
the thinking before an answer (`spoken`).
"""

import importlib
import json
import math
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune.ask.overlaps import iou_at, need, point_in_box, time_iou, time_iou_at

Metric = Callable[[str, Sequence[str]], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NAMED = re.compile(
    r"\b(?i:answer|option|choice)\b(?i:\s+is)?[^A-Za-z]*(?:([A-Z])(?![A-Za-z'\u2019])|([a-z])\s*(?:[).:,;]|$))"
)
_MARKED = re.compile(r"[^A-Za-z0-9]*([A-Za-z])\s*(?:[).:,;*]|$)")
_ALONE = re.compile(r"(?<![A-Za-z'\u2019])([A-Z])(?![A-Za-z'\u2019])")
_ARTICLE = re.compile(r"A\s+[a-z]")


def find_metric(name: str) -> Metric:
    """Find a metric by name: one of ours, `iou@0.5`, `time-iou@0.5`, or the user's `module:function`."""
    if ":" in name:
        return _of_user(name)
    plain, at, threshold = name.partition("@")
    if plain in _AT and at:
        try:
            limit = float(threshold)
        except ValueError:
            limit = math.nan
        if not 0 < limit <= 1:
            raise ValueError(
                f"--metric {name}: after @ there must be an overlap above 0 and at most 1, for instance {plain}@0.5"
            )
        measure = _AT[plain]
        return lambda answer, references: float(measure(answer, references, limit))
    if at or name not in _PLAIN:
        raise ValueError(
            f"--metric {name!r} is not known; use {', '.join(METRICS)}, or module:function for one of your own"
        )
    return _PLAIN[name]


def spoken(answer: str) -> str:
    """Return the answer without the thinking before it."""
    return answer.rpartition("</think>")[2].strip()


def exact(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the texts are equal, apart from surrounding white space and Unicode composition."""
    return float(_composed(answer) in map(_composed, references))


def contains(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the answer contains a reference as whole words, in upper or lower case; 19 does not contain 9."""
    text = _composed(answer).casefold()
    words = (re.escape(_composed(reference).casefold()) for reference in references)
    return float(any(re.search(rf"(?<!\w){word}(?!\w)", text) for word in words if word))


def choice(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the answer chooses the letter of the reference: `B`, `(b) a horse`, `The answer is B`."""
    letters = [chosen_letter(reference) for reference in references]
    need(all(letters), references, "letter of an option", "choice")
    return float(chosen_letter(answer) in letters)


def chosen_letter(text: str) -> str | None:
    """Return the option that an answer chooses: the last named as such, one marked at the start, or the only letter."""
    if named := [upper or lower for upper, lower in _NAMED.findall(text)]:
        return str(named[-1]).upper()
    if marked := _MARKED.match(text):
        return marked[1].upper()
    alone = [letter for letter in _ALONE.finditer(text) if letter[1] != "I"]
    if len({letter[1] for letter in alone}) != 1:
        return None
    # "A horse" begins with an article and chooses nothing
    return None if alone[0][1] == "A" and _ARTICLE.match(text, alone[0].start()) else alone[0][1]


def f1(answer: str, references: Sequence[str]) -> float:
    """Return the word overlap as SQuAD counts it: lower case, without punctuation and articles."""
    return max(_word_f1(_squad_words(answer), _squad_words(reference)) for reference in references)


def anls(answer: str, references: Sequence[str]) -> float:
    """Return DocVQA's normalised Levenshtein similarity: in lower case, 0 below one half (Biten et al., ICCV 2019)."""
    best = 0.0
    for reference in references:
        answered, expected = " ".join(answer.lower().split()), " ".join(reference.lower().split())
        longest = max(len(answered), len(expected))
        if 2 * abs(len(answered) - len(expected)) >= longest > 0:
            continue  # the lengths differ so much that the similarity is below one half
        distance = levenshtein(answered, expected) / longest if longest else 0.0
        best = max(best, 1 - distance if distance < 0.5 else 0.0)
    return best


def relaxed(answer: str, references: Sequence[str]) -> float:
    """Return ChartQA's relaxed accuracy: numbers within 5 % of the reference, other text equal in lower case."""
    return float(any(_relaxed(answer.strip(), reference.strip()) for reference in references))


def json_field_f1(answer: str, references: Sequence[str]) -> float:
    """Return F1 over the fields of a JSON object, each a path and a value. Numbers compare by value, text by words."""
    fields = _fields(find_json(answer))
    best = 0.0
    for reference in references:
        expected = find_json(reference)
        need(expected is not None, references, "JSON object or list", "json-field-f1")
        best = max(best, _word_f1(fields, _fields(expected)))
    return best


_PLAIN: dict[str, Metric] = {
    "exact": exact,
    "contains": contains,
    "choice": choice,
    "f1": f1,
    "anls": anls,
    "relaxed": relaxed,
    "point-in-box": point_in_box,
    "json-field-f1": json_field_f1,
    "time-iou": time_iou,
}
_AT: dict[str, Callable[[str, Sequence[str], float], float]] = {"iou": iou_at, "time-iou": time_iou_at}
METRICS = (*_PLAIN, *(f"{name}@t" for name in _AT))


def _of_user(name: str) -> Metric:
    module, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:  # last, so that no file in the current folder hides a package
        sys.path.append(str(Path.cwd()))
    try:
        metric = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--metric {name}: {error}. Write module:function, importable from this folder") from error

    def measured(answer: str, references: Sequence[str]) -> float:
        score = metric(answer, list(references))
        if not isinstance(score, (bool, int, float)) or not 0 <= score <= 1:
            raise ValueError(
                f"--metric {name} gave {score!r} for the answer {answer!r:.80}; a score must be from 0 to 1"
            )
        return float(score)

    return measured


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _squad_words(text: str) -> list[str]:
    bare = "".join(mark for mark in text.lower() if mark not in string.punctuation)
    return _ARTICLES.sub(" ", bare).split()


def _word_f1(answered: Sequence[Any], expected: Sequence[Any]) -> float:
    if not answered or not expected:
        return float(not answered and not expected)
    common = sum((Counter(answered) & Counter(expected)).values())
    return 2 * common / (len(answered) + len(expected))


def levenshtein(first: str, second: str) -> int:
    """Return the fewest insertions, deletions and replacements of characters between two texts.

    A column of the usual table is stored as two numbers, with a bit where it rises and where it falls from row to row
    (Hyyro 2003), so that texts of thousands of characters take milliseconds.
    """
    if not first:
        return len(second)
    places: dict[str, int] = {}
    for at, mark in enumerate(first):
        places[mark] = places.get(mark, 0) | 1 << at
    ones, last = (1 << len(first)) - 1, 1 << (len(first) - 1)
    rises = ones
    falls = 0
    distance = len(first)
    for mark in second:
        equal = places.get(mark, 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal | falls
        grows = falls | ~(diagonal | rises)
        shrinks = rises & diagonal
        distance += bool(grows & last) - bool(shrinks & last)
        grows = grows << 1 | 1
        rises = (shrinks << 1 | ~(diagonal | grows)) & ones
        falls = grows & diagonal & ones
    return distance


def _relaxed(answer: str, reference: str) -> bool:
    answered, expected = _value(answer), _value(reference)
    if answered is not None and expected:
        return abs(answered - expected) / abs(expected) <= 0.05
    return answer.lower() == reference.lower()


def _value(text: str) -> float | None:
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def find_json(text: str) -> Any:
    """Return the first JSON object or list in a text, fenced or bare; None if there is none."""
    decoder = json.JSONDecoder(parse_int=float)  # a model that repeats itself may write integers of any length
    for start in (bracket.start() for bracket in re.finditer(r"[{\[]", text)):
        try:
            return decoder.raw_decode(text, start)[0]
        except json.JSONDecodeError:
            continue
        except RecursionError:
            return None
    return None


def _fields(value: Any) -> list[tuple[str, Any]]:
    """Return the leaves with their paths, at any depth; the order of a list does not count."""
    fields: list[tuple[str, Any]] = []
    left = [("", value)]
    while left:
        path, item = left.pop()
        if isinstance(item, dict):
            left += [(f"{path}.{str(key).casefold()}", inner) for key, inner in item.items()]
        elif isinstance(item, list):
            left += [(f"{path}[]", inner) for inner in item]
        else:
            fields.append((path, _leaf(item)))
    return fields


def _leaf(item: Any) -> Any:
    if isinstance(item, str):
        number = _value(item.strip())
        return " ".join(item.casefold().split()) if number is None else number
    if isinstance(item, bool) or item is None:
        return json.dumps(item)  # true, which is not 1
    return float(item)
