"""A row of any known shape to our record, with media still by path. No torch.

A converted row may hold images and videos as text (path, url or data: url) or as objects; `prepare/rows.py` reads them.
"""

from collections.abc import Mapping
from typing import Any

from data.format.fields import BadField
from data.format.record import load_json
from data.rows.columns import ALWAYS, OURS, Columns, with_lists
from data.rows.refused import refuse, refuse_part
from data.rows.shapes import shape_of
from data.rows.steps import SPAN_COLUMNS, with_clip

_FROM = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_FROM |= {"observation": "tool", "tool": "tool", "tool_response": "tool"}
_FROM |= {"developer": "system"}  # OpenAI's newer word
_CALLS = ("function_call", "tool_call")


def convert_row(row: Any, columns: Columns | None = None) -> tuple[dict[str, Any], list[str]]:
    """Return the one record of a row, as convert_rows does; ValueError if the row becomes several."""
    records, ignored = convert_rows(row, columns)
    if len(records) != 1:
        raise BadField("row", f"becomes {len(records)} samples; give one with a single answer")
    return records[0], ignored


def convert_rows(row: Any, columns: Columns | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """Return our records as JSON objects, and the columns that are not used; ValueError if the row has no known shape.

    Only the steps of an agent become several records.
    """
    if not isinstance(row, Mapping):
        raise BadField("row", f"is a {type(row).__name__}; write one JSON object")
    row = with_clip(with_lists((columns or Columns()).apply(row)))
    refuse(row)
    shape = shape_of(row)
    used = {*ALWAYS, *shape.columns, *(SPAN_COLUMNS if row.get("video") else ())}
    ignored = sorted(str(name) for name in set(row) - used)
    return [_record(row, read) for read in shape.samples(row)], ignored


def _record(row: Mapping[str, Any], read: dict[str, Any]) -> dict[str, Any]:
    """Return a record of the columns that every shape has, and of the turns and media that this one's reader found."""
    where = read.pop("where", "messages")
    row = {**row, **({"image": None} if "images" in read else {}), **read}
    messages = [*_system(row), *(_turn(turn, f"{where}[{at}]") for at, turn in enumerate(row["messages"]))]
    out: dict[str, Any] = {"v": row.get("v") or 1, "messages": messages}
    out |= {name: row[name] for name in OURS if row.get(name) is not None}
    if "id" in out:
        out["id"] = str(out["id"])
    if tools := row.get("tools"):
        out["tools"] = load_json(tools) if isinstance(tools, str) else tools
    media = {name: _list(row, name) for name in ("image", "video")}
    _pull_media(messages, media)
    _rename_marks(messages, media)
    _add_marks(messages, media)
    out |= {f"{name}s": places for name, places in media.items() if places}
    return out


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    both = [row.get(name), row.get(f"{name}s")]
    if both[0] and both[1]:
        raise BadField(name, f"and {name}s are both given; keep one")
    value = both[0] or both[1] or []
    return list(value) if isinstance(value, list) else [value]


def _system(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    system = row.get("system")
    return [{"role": "system", "content": system}] if system else []


def _turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise BadField(where, f"is {turn!r:.80}; write a JSON object")
    turn = {name: value for name, value in turn.items() if value is not None}  # tables fill what a turn lacks with null
    role = turn.pop("from", None) or turn.pop("role", None)
    content = turn.pop("value") if "value" in turn else turn.pop("content", None)
    if not isinstance(role, str):
        role = repr(role)
    if role in _CALLS:  # a turn of its own, holding the call as JSON text or as an object
        call = load_json(content) if isinstance(content, str) else content
        return {"role": "assistant", "content": "", "tool_calls": call if isinstance(call, list) else [call]}
    if role not in _FROM:
        raise BadField(f"{where}.role", f"is {role!r}; known: {', '.join([*_FROM, *_CALLS])}")
    if "loss_scale" in turn and turn.get("loss") is None:
        turn["loss"] = turn.pop("loss_scale")
    for name in ("name", "tool_call_id", "refusal", "audio", "weight"):
        value = turn.pop(name, None)  # OpenAI's; `weight` 0 or 1 says whether the turn is trained on
        if name == "weight" and value is not None:
            turn["loss"] = value
        elif name in ("refusal", "audio") and value is not None:
            raise BadField(f"{where}.{name}", "cannot be shown to this model; leave it out")
    return {"role": _FROM[role], "content": content, **turn}


def _pull_media(messages: list[dict[str, Any]], media: dict[str, list[Any]]) -> None:
    """Move media inside a list of contents (OpenAI's image_url, Qwen's image) to the sample's lists."""
    for number, message in enumerate(messages):
        if not isinstance(message["content"], list):
            continue
        contents = []
        for at, item in enumerate(message["content"]):
            kind, place = _kind_and_place(item, f"messages[{number}].content[{at}]")
            if place is not None:
                media[kind].append(place)
            if isinstance(item, Mapping):
                item = {name: value for name, value in item.items() if value is not None}
            contents.append({"type": kind} if kind in media else item)
        message["content"] = contents


def _kind_and_place(item: Any, where: str) -> tuple[str, Any]:
    if not isinstance(item, Mapping):
        return "", None
    refuse_part(item, where)
    kind = str(item.get("type", ""))
    short = kind.removesuffix("_url").removeprefix("input_")
    if short not in ("image", "video"):
        return kind, None
    value = item.get(kind, item.get(short))
    return short, value.get("url") if isinstance(value, Mapping) and value.get("url") else value


def _rename_marks(messages: list[dict[str, Any]], media: dict[str, list[Any]]) -> None:
    """Read `<image>` as `<video>` where a row has only videos, as LLaVA-Video writes it."""
    written = [message for message in messages if isinstance(message["content"], str)]
    marks = sum(message["content"].count("<image>") for message in written)
    if media["image"] or marks != len(media["video"]) or any("<video>" in message["content"] for message in written):
        return
    for message in written:
        message["content"] = message["content"].replace("<image>", "<video>")


def _add_marks(messages: list[dict[str, Any]], media: dict[str, list[Any]]) -> None:
    """Put media without marks in front of the first question, as ms-swift does; a wrong count stays wrong."""
    written = [message["content"] for message in messages if isinstance(message["content"], str)]
    listed = [item for message in messages if isinstance(message["content"], list) for item in message["content"]]
    front = ""
    for name, places in media.items():
        marked = any(f"<{name}>" in text for text in written)
        marked = marked or any(isinstance(item, dict) and item.get("type") == name for item in listed)
        front += "" if marked else f"<{name}>" * len(places)
    first = next((message for message in messages if message["role"] == "user"), None)
    if front and first is not None and isinstance(first["content"], str):
        first["content"] = front + first["content"]
