"""Answers that point: boxes and points in an image, spans of time in a video, and how far they overlap. No torch."""

import re
from collections.abc import Sequence

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_CLOCK = r"(?:\d+:)?\d{1,2}:\d{2}(?:\.\d+)?"
_TIME = re.compile(rf"{_CLOCK}|(?:\d+\.?\d*|\.\d+)")
_BOX = re.compile(rf"[\[(]\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*[\])]")
_POINT = re.compile(rf"[\[(]\s*({_NUMBER})\s*,\s*({_NUMBER})\s*[\])]")

Box = tuple[float, float, float, float]


def point_in_box(answer: str, references: Sequence[str]) -> float:
    """1 when the first point of the answer, or the middle of its first box, lies in a box of the reference."""
    point = _first_point(answer)
    boxes = [box for reference in references for box in find_boxes(reference)]
    need(boxes, references, "box [x1, y1, x2, y2]", "point-in-box")
    return float(point is not None and any(b[0] <= point[0] <= b[2] and b[1] <= point[1] <= b[3] for b in boxes))


def time_iou(answer: str, references: Sequence[str]) -> float:
    """Overlap of two spans of time over their union: seconds or clock times, the first two of the answer."""
    spans = [_span(reference) for reference in references]
    need(all(spans), references, "pair of times, in seconds or as 00:01:30", "time-iou")
    found = _span(answer)
    return max((_overlap(found, span) for span in spans if span), default=0.0) if found else 0.0


def time_iou_at(answer: str, references: Sequence[str], limit: float) -> bool:
    """Whether the spans overlap by at least so much."""
    return time_iou(answer, references) >= limit


def iou_at(answer: str, references: Sequence[str], limit: float) -> float:
    """Boxes that overlap by at least `limit`, one to one, over all boxes given or wanted: for one box, hit or miss."""
    found = find_boxes(answer)
    best = 0.0
    for reference in references:
        wanted = find_boxes(reference)
        need(wanted, references, "box [x1, y1, x2, y2]", "iou@t")
        best = max(best, _matched(found, wanted, limit) / max(len(found), len(wanted)))
    return best


def need(found: object, references: Sequence[str], wanted: str, metric: str) -> None:
    """Raise unless the references hold what their metric measures."""
    if not found:
        raise ValueError(f"--metric {metric}: the reference {list(references)!r:.200} holds no {wanted}")


def find_boxes(text: str) -> list[Box]:
    """Every [x1, y1, x2, y2] in a text, corners in order."""
    found = []
    for numbers in _BOX.findall(text):
        x1, y1, x2, y2 = map(float, numbers)
        found.append((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    return found


def _first_point(text: str) -> tuple[float, float] | None:
    point, box = _POINT.search(text), _BOX.search(text)
    if point and (not box or point.start() < box.start()):
        return float(point[1]), float(point[2])
    if not box:
        return None
    return (float(box[1]) + float(box[3])) / 2, (float(box[2]) + float(box[4])) / 2


def box_iou(one: Box, two: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    inside = max(width, 0.0) * max(height, 0.0)
    union = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, two)) - inside
    return inside / union if union > 0 else float(one == two)


def _matched(found: Sequence[Box], wanted: Sequence[Box], limit: float) -> int:
    """Most pairs that overlap enough, each box in one pair: augmenting paths."""
    near = [[at for at, other in enumerate(wanted) if box_iou(box, other) >= limit] for box in found]
    partner: dict[int, int] = {}

    def place(box: int, tried: set[int]) -> bool:
        for other in near[box]:
            if other not in tried:
                tried.add(other)
                if other not in partner or place(partner[other], tried):
                    partner[other] = box
                    return True
        return False

    return sum(place(box, set()) for box in range(len(found)))


def _span(text: str) -> tuple[float, float] | None:
    times = [_seconds(found) for found in _TIME.findall(text)[:2]]
    return (min(times), max(times)) if len(times) == 2 else None


def _seconds(text: str) -> float:
    total = 0.0
    for part in text.split(":"):
        total = total * 60 + float(part)
    return total


def _overlap(one: tuple[float, float], two: tuple[float, float]) -> float:
    union = max(one[1], two[1]) - min(one[0], two[0])
    return max(min(one[1], two[1]) - max(one[0], two[0]), 0.0) / union if union else 1.0
