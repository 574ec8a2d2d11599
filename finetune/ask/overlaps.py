"""Scores answers that point: boxes and points in an image, spans of time in a video. No torch."""

import re
from collections.abc import Sequence

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_CLOCK = r"(?:\d+:)?\d{1,2}:\d{2}(?:\.\d+)?"
_TIME = re.compile(rf"{_CLOCK}|(?:\d+\.?\d*|\.\d+)")
_BOX = re.compile(rf"[\[(]\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*[\])]")
_POINT = re.compile(rf"[\[(]\s*({_NUMBER})\s*,\s*({_NUMBER})\s*[\])]")

Box = tuple[float, float, float, float]


def point_in_box(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the first point of the answer, or the middle of its first box, lies in a box of the reference."""
    point = _first_point(answer)
    boxes = [box for reference in references for box in find_boxes(reference)]
    need(boxes, references, "box [x1, y1, x2, y2]", "point-in-box")
    return float(point is not None and any(_contains(box, point) for box in boxes))


def _contains(box: Box, point: tuple[float, float]) -> bool:
    left, top, right, bottom = box
    return left <= point[0] <= right and top <= point[1] <= bottom


def time_iou(answer: str, references: Sequence[str]) -> float:
    """Return the intersection over union of two spans of time; an answer's span is between its first two times."""
    spans = [_span(reference) for reference in references]
    need(all(spans), references, "pair of times, in seconds or as 00:01:30", "time-iou")
    answered = _span(answer)
    return max((_overlap(answered, span) for span in spans if span), default=0.0) if answered else 0.0


def time_iou_at(answer: str, references: Sequence[str], limit: float) -> bool:
    """Return whether the spans overlap by at least `limit`."""
    return time_iou(answer, references) >= limit


def iou_at(answer: str, references: Sequence[str], limit: float) -> float:
    """Return the share of boxes matched one to one with an overlap of at least `limit`; for one box it is 0 or 1."""
    answered = find_boxes(answer)
    best = 0.0
    for reference in references:
        expected = find_boxes(reference)
        need(expected, references, "box [x1, y1, x2, y2]", "iou@t")
        best = max(best, _matched(answered, expected, limit) / max(len(answered), len(expected)))
    return best


def need(is_there: object, references: Sequence[str], what: str, metric: str) -> None:
    """Raise ValueError unless the references contain what their metric measures."""
    if not is_there:
        raise ValueError(f"--metric {metric}: the reference {list(references)!r:.200} contains no {what}")


def find_boxes(text: str) -> list[Box]:
    """Return every [x1, y1, x2, y2] in a text, with the corners in order."""
    boxes = []
    for numbers in _BOX.findall(text):
        x1, y1, x2, y2 = map(float, numbers)
        boxes.append((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    return boxes


def _first_point(text: str) -> tuple[float, float] | None:
    point, box = _POINT.search(text), _BOX.search(text)
    if point and (not box or point.start() < box.start()):
        return float(point[1]), float(point[2])
    if not box:
        return None
    return (float(box[1]) + float(box[3])) / 2, (float(box[2]) + float(box[4])) / 2


def box_iou(first: Box, second: Box) -> float:
    """Return the intersection over union of two boxes."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    inside = max(width, 0.0) * max(height, 0.0)
    union = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (first, second)) - inside
    return inside / union if union > 0 else float(first == second)


def _matched(answered: Sequence[Box], expected: Sequence[Box], limit: float) -> int:
    """Return the largest number of pairs that overlap enough, each box in one pair, by augmenting paths."""
    near = [[at for at, other in enumerate(expected) if box_iou(box, other) >= limit] for box in answered]
    partner: dict[int, int] = {}

    def place(box: int, tried: set[int]) -> bool:
        for other in near[box]:
            if other not in tried:
                tried.add(other)
                if other not in partner or place(partner[other], tried):
                    partner[other] = box
                    return True
        return False

    return sum(place(box, set()) for box in range(len(answered)))


def _span(text: str) -> tuple[float, float] | None:
    times = [_seconds(time) for time in _TIME.findall(text)[:2]]
    return (min(times), max(times)) if len(times) == 2 else None


def _seconds(text: str) -> float:
    total = 0.0
    for part in text.split(":"):
        total = total * 60 + float(part)
    return total


def _overlap(first: tuple[float, float], second: tuple[float, float]) -> float:
    union = max(first[1], second[1]) - min(first[0], second[0])
    return max(min(first[1], second[1]) - max(first[0], second[0]), 0.0) / union if union else 1.0
