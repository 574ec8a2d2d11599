"""The table of shapes: how each is recognised by its columns, and what reads it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from data.format.fields import BadField
from data.rows.chats import (
    alpaca,
    caption,
    cauldron,
    prompt_completion,
    query_response,
    question_answer,
    qwen_vl,
    turns_of,
)
from data.rows.columns import nearest
from data.rows.documents import interleaved, list_of_parts, mmc4, obelics
from data.rows.steps import has_steps, moments, trajectory

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One shape of rows."""

    name: str
    needs: str
    """Its columns in words, for messages."""
    columns: tuple[str, ...]
    """All columns that its reader takes, those it is recognised by first."""
    fits: Callable[[Row], bool]
    read: Callable[[Row], dict[str, Any] | list[dict[str, Any]]]

    def samples(self, row: Row) -> list[dict[str, Any]]:
        """Return the turns of each sample of a row."""
        read = self.read(row)
        return read if isinstance(read, list) else [read]


def _has(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(row.get(name) is not None for name in names)


def _has_parts(row: Row) -> bool:
    turns = row.get("messages")
    return isinstance(turns, list) and any(
        isinstance(turn, Mapping) and isinstance(turn.get("content"), list) for turn in turns
    )


def _talks(row: Row) -> bool:
    return row.get("conversations") is not None or row.get("conversation") is not None


def _names_images_in_text(row: Row) -> bool:
    turns = row.get("conversations") or row.get("conversation")
    texts = [turn.get("value", turn.get("content")) for turn in turns or () if isinstance(turn, Mapping)]
    return not _is_seen(row) and any(isinstance(text, str) and "<img>" in text and "</img>" in text for text in texts)


def _is_seen(row: Row) -> bool:
    return any(row.get(name) for name in ("image", "images", "video", "videos"))


def _has_lists(row: Row) -> bool:
    return all(isinstance(row.get(name), list) for name in ("texts", "images"))


def _is_answered(row: Row) -> bool:
    return row.get("question") is not None and (row.get("answer") is not None or bool(row.get("answers")))


_TURNS = ("messages", "conversations", "conversation")

SHAPES = (
    Shape(name="OpenAI messages", needs="messages with lists of parts", columns=_TURNS, fits=_has_parts, read=turns_of),
    Shape(
        name="messages", needs="messages with role and content", columns=_TURNS, fits=_has("messages"), read=turns_of
    ),
    Shape(
        name="Qwen-VL",
        needs="conversations with <img> in the text",
        columns=_TURNS[1:],
        fits=_names_images_in_text,
        read=qwen_vl,
    ),
    Shape(
        name="LLaVA",
        needs="conversations with from and value, image or video",
        columns=_TURNS[1:],
        fits=lambda row: _talks(row) and _is_seen(row),
        read=turns_of,
    ),
    Shape(name="ShareGPT", needs="conversations with from and value", columns=_TURNS[1:], fits=_talks, read=turns_of),
    Shape(
        name="Cauldron",
        needs="images, and texts of {user, assistant}",
        columns=("texts",),
        fits=lambda row: isinstance(row.get("texts"), list) and any(isinstance(turn, Mapping) for turn in row["texts"]),
        read=cauldron,
    ),
    Shape(
        name="OBELICS",
        needs="images and texts, one of each pair null",
        columns=("texts", "metadata", "general_metadata"),
        fits=_has_lists,
        read=obelics,
    ),
    Shape(
        name="MMC4",
        needs="text_list and image_info",
        columns=("text_list", "image_info", "similarity_matrix"),
        fits=_has("text_list", "image_info"),
        read=mmc4,
    ),
    Shape(
        name="agent trajectory",
        needs="goal, and steps of {screenshot, action}, or screens and actions",
        columns=("steps", "actions", "goal", "task", "instruction", "query", "question", "screens", "screenshots")
        + ("past_screens",),
        fits=has_steps,
        read=trajectory,
    ),
    Shape(
        name="moments of a video",
        needs="video, timestamps and sentences",
        columns=("timestamps", "sentences", "duration"),
        fits=lambda row: isinstance(row.get("timestamps"), list) and row.get("sentences") is not None,
        read=moments,
    ),
    Shape(
        name="prompt and completion",
        needs="prompt and completion",
        columns=("prompt", "completion"),
        fits=_has("prompt", "completion"),
        read=prompt_completion,
    ),
    Shape(
        name="Alpaca",
        needs="instruction and output, with input and history",
        columns=("instruction", "output", "input", "history"),
        fits=_has("instruction", "output"),
        read=alpaca,
    ),
    Shape(
        name="query and response",
        needs="query and response, with history",
        columns=("query", "response", "history"),
        fits=_has("query", "response"),
        read=query_response,
    ),
    Shape(
        name="question and answer",
        needs="question, and answer or answers",
        columns=("question", "answer"),
        fits=_is_answered,
        read=question_answer,
    ),
    Shape(
        name="interleaved parts",
        needs="content, parts, interleaved or sequence: a list of texts and images",
        columns=("content", "parts", "interleaved", "sequence"),
        fits=lambda row: list_of_parts(row) is not None,
        read=interleaved,
    ),
    Shape(
        name="captions",
        needs="image or video, and text or caption",
        columns=("text", "caption", "txt"),
        fits=lambda row: _is_seen(row) and any(row.get(name) is not None for name in ("text", "caption", "txt")),
        read=caption,
    ),
)


def shape_of(row: Row) -> Shape:
    """Return the first shape that the row fits; BadField with the known ones and the nearest if there is none."""
    for shape in SHAPES:
        if shape.fits(row):
            return shape
    known = "; ".join(f"{shape.name} ({shape.needs})" for shape in SHAPES)
    raise BadField(
        "row",
        f"has the columns {', '.join(sorted(map(str, row))) or '(none)'}, which is no known shape. {_nearest(row)} "
        f"Name columns that are called something else with `map`. Known shapes: {known}",
    )


def is_known(row: Row) -> bool:
    """Say whether the row fits a shape."""
    return any(shape.fits(row) for shape in SHAPES)


def _nearest(row: Row) -> str:
    """Say which shape the columns come nearest to, and how a column that is nearly a known one is called."""
    names = [str(name) for name, value in row.items() if value is not None]

    def score(shape: Shape) -> float:
        exact = sum(name in names for name in shape.columns)
        return exact + 0.5 * sum(bool(nearest(name, shape.columns)) for name in names if name not in shape.columns)

    best = max(SHAPES, key=score)
    if not score(best):
        return "None is near."
    return f"The nearest is {best.name}, which needs {best.needs}."


def recognised(rows: Iterable[Row]) -> str:
    """Return the names of the shapes of these rows, with their columns: `Cauldron (columns images, texts)`."""
    seen: dict[str, set[str]] = {}
    for row in rows:
        shape = shape_of(row)
        used = {name for name in (*shape.columns, "image", "images", "video", "videos") if row.get(name) is not None}
        seen.setdefault(shape.name, set()).update(used)
    return " and ".join(f"{name} (columns {', '.join(sorted(used))})" for name, used in seen.items())
