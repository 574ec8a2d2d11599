"""Converts rows of ms-swift, LLaMA-Factory, OpenAI and Qwen to our record, with media still by path. No torch.

A converted row may hold images and videos as text (path, url or data: url) or as objects; `build.py` reads them.
"""

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from data.format.fields import BadField
from data.format.record import load_json
from data.shards.bytes import Places

REJECTS = "rejects.jsonl"
"""The refused rows with reasons; a build writes this file last."""
_FROM = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_FROM |= {"observation": "tool", "tool": "tool", "tool_response": "tool"}
_FROM |= {"developer": "system"}  # OpenAI's newer word
_CALLS = ("function_call", "tool_call")
_OURS = ("id", "source", "group", "license", "objects", "answers")
_READ = (
    *_OURS,
    "v",
    "messages",
    "conversations",
    "conversation",
    "system",
    "tools",
    "image",
    "images",
    "video",
    "videos",
)
_ALPACA = ("instruction", "input", "output", "history")


def stamp_of_rows(source: Path) -> str:
    """Return a hash of the file's content."""
    digest = blake2b(digest_size=8)
    with source.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def folder_of_shards(source: Path, cache_dir: Path | None, places: Places) -> Path:
    """Return the folder for the shards of a file of rows: next to it or in the cache, with its hash in the name."""
    return (cache_dir or source.parent) / f"{source.stem}-{stamp_of_rows(source)}{places.suffix}"


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield number (from 1) and row of a JSON Lines file or a JSON list; a row that is not JSON is a ValueError."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield number, load_json(line)
                    except ValueError as error:
                        yield number, error
        return
    try:
        rows = load_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{path} contains a {type(rows).__name__}; write a list of rows, or one row per line in a .jsonl file"
        )
    yield from enumerate(rows, 1)


def convert_row(row: Any) -> tuple[dict[str, Any], list[str]]:
    """Return our record as a JSON object, and the columns it does not use; ValueError if the row has no known form."""
    if not isinstance(row, Mapping):
        raise BadField("row", f"is a {type(row).__name__}; write one JSON object")
    ignored = sorted(set(row) - {*_READ, *_ALPACA})
    messages = [*_system(row), *_turns(row)]
    out: dict[str, Any] = {"v": row.get("v", 1), "messages": messages}
    out |= {name: row[name] for name in _OURS if row.get(name) is not None}
    if "id" in out:
        out["id"] = str(out["id"])
    if tools := row.get("tools"):
        out["tools"] = load_json(tools) if isinstance(tools, str) else tools
    media = {name: _list(row, name) for name in ("image", "video")}
    _pull_media(messages, media)
    _add_marks(messages, media)
    out |= {f"{name}s": places for name, places in media.items() if places}
    return out, ignored


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    both = [row.get(name), row.get(f"{name}s")]
    if both[0] and both[1]:
        raise BadField(name, f"and {name}s are both given; keep one")
    value = both[0] or both[1] or []
    return list(value) if isinstance(value, list) else [value]


def _system(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    system = row.get("system")
    return [{"role": "system", "content": system}] if system else []


def _turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    for name in ("messages", "conversations", "conversation"):
        if row.get(name) is not None:
            if not isinstance(row[name], list):
                raise BadField(name, f"is a {type(row[name]).__name__}; write a list of turns")
            return [_turn(turn, f"{name}[{index}]") for index, turn in enumerate(row[name])]
    if row.get("instruction") is None or row.get("output") is None:
        known = "messages, conversations, or instruction and output"
        raise BadField("row", f"has none of {known}, but {sorted(map(str, row))}")
    for name in ("instruction", "input"):
        if not isinstance(row.get(name) or "", str):
            raise BadField(name, f"is {row[name]!r:.80}; write text")
    history = row.get("history") or []
    if not isinstance(history, list):
        raise BadField("history", f"is {history!r:.80}; write [question, answer] pairs")
    question = "\n".join(text for text in (row["instruction"], row.get("input")) if text)
    pairs = [*history, [question, row["output"]]]
    turns = []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadField("history", f"holds {pair!r:.80}; write [question, answer] pairs")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise BadField(where, f"is {turn!r:.80}; write a JSON object")
    turn = dict(turn)
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
    for message in messages:
        if not isinstance(message["content"], list):
            continue
        contents = []
        for item in message["content"]:
            kind, place = _kind_and_place(item)
            if place is not None:
                media[kind].append(place)
            contents.append({"type": kind} if kind in media else item)
        message["content"] = contents


def _kind_and_place(item: Any) -> tuple[str, Any]:
    if not isinstance(item, Mapping):
        return "", None
    kind = str(item.get("type", ""))
    short = kind.removesuffix("_url").removeprefix("input_")
    if short not in ("image", "video"):
        return kind, None
    value = item.get(kind, item.get(short))
    return short, value.get("url") if isinstance(value, Mapping) and "url" in value else value


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
