"""The record of a sample: what a JSON member of a shard means. Every error names shard and key. No torch."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from data.format.content import Content, read_contents, write_contents
from data.format.fields import BadField, Fields, check_text
from data.format.media import ImageRef, Objects, VideoRef, media_members, read_image, read_objects, read_video
from data.format.printable import count_of

VERSION = 1
_LONGEST_NUMBER = 300  # digits; a float has 308
MAX_DEPTH = 100
"""Most lists and objects inside one another: templates can walk them, and no real tool description comes near."""
ROLES = ("system", "user", "assistant", "tool")


class RecordError(ValueError):
    """One sample is wrong; the message says where it is (shard and key) and why."""

    def __init__(self, *, shard: str, key: str, reason: str) -> None:
        super().__init__(f"shard {shard or '(none)'}, sample {key or '(none)'}: {reason}")
        self.shard = shard
        self.key = key
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the keyword-only arguments, for the way back from a worker process."""
        return _rebuild, (self.shard, self.key, self.reason)


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call that the assistant makes."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Message:
    """A turn. `loss` None means the default: 1 for the assistant, 0 for every other role."""

    role: Literal["system", "user", "assistant", "tool"]
    contents: tuple[Content, ...]
    loss: float | None = None
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def weight(self) -> float:
        """The loss weight of this turn's tokens."""
        return self.loss if self.loss is not None else float(self.role == "assistant")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A sample as written: turns whose marks take images, videos and objects in order of appearance."""

    id: str
    messages: tuple[Message, ...]
    source: str = ""
    images: tuple[ImageRef, ...] = ()
    videos: tuple[VideoRef, ...] = ()
    objects: Objects | None = None
    tools: tuple[dict[str, Any], ...] = ()
    group: str | None = None
    license: str | None = None
    answers: tuple[str, ...] = ()  # all that evaluation accepts for the last turn; the turn itself when empty

    @property
    def supervised(self) -> bool:
        """Return whether any turn carries loss."""
        return any(message.weight > 0 for message in self.messages)


def _rebuild(shard: str, key: str, reason: str) -> RecordError:
    return RecordError(shard=shard, key=key, reason=reason)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON; write a number or leave the field out")


def load_json(data: bytes | str) -> Any:
    """Read JSON without NaN and Infinity, nested at most MAX_DEPTH deep; ValueError for anything else."""
    try:
        value = json.loads(data, parse_constant=_no_constant, parse_int=_number)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    openings = (b"[", b"{") if isinstance(data, bytes) else ("[", "{")
    # counting is fast, and nearly all JSON has fewer brackets than this
    if sum(map(data.count, openings)) > MAX_DEPTH and isinstance(value, (dict, list)) and _is_deep(value):  # type: ignore[arg-type]  # of data's own type
        raise ValueError(_TOO_DEEP)
    return value


def decode_json(text: str, start: int) -> tuple[Any, int]:
    """Read the value that begins at `start` as load_json does; return it and the position behind it."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    if isinstance(value, (dict, list)) and _is_deep(value):
        raise ValueError(_TOO_DEEP)
    return value, end


def _is_deep(value: dict[str, Any] | list[Any]) -> bool:
    level: list[dict[str, Any] | list[Any]] = [value]
    for _ in range(MAX_DEPTH):
        inner = [item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer)]
        level = [item for item in inner if isinstance(item, (dict, list))]
    return bool(level)


def _number(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits, {digits[:12]}..., is none that can be computed with")
    return int(digits)


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_int=_number)
_TOO_DEEP = f"JSON is nested more than {MAX_DEPTH} deep; flatten it"


def parse_record(
    raw: Mapping[str, Any] | bytes | str, *, shard: str, key: str, members: Collection[str] | None = None
) -> Record:
    """Read the record of a sample, or raise RecordError. `members`, if given, must be those that its media name."""
    try:
        if isinstance(raw, (bytes, str)):
            raw = load_json(raw)
        if not isinstance(raw, Mapping):
            raise BadField("record", f"is a {type(raw).__name__}; write one JSON object with `messages`")
        record = _read_record(Fields(raw, ""), key)
        _check_marks(record)
        if members is not None:
            _check_members(record, members)
    except ValueError as error:
        raise RecordError(shard=shard, key=key, reason=str(error)) from error
    return record


def _read_record(fields: Fields, key: str) -> Record:
    version = fields.take("v", int, None)
    if version is None:
        raise BadField("v", f'is missing; write "v": {VERSION}, the version of this format')
    if version != VERSION:
        raise BadField("v", f"is {version}; this moetune reads version {VERSION} only")
    objects = fields.take("objects", Mapping, None)
    record = Record(
        id=fields.text("id", key),
        source=fields.text("source", ""),
        messages=tuple(_read_message(item) for item in fields.objects("messages")),
        images=tuple(read_image(item, where) for item, where in fields.items("images")),
        videos=tuple(read_video(item, where) for item, where in fields.items("videos")),
        objects=None if objects is None else read_objects(Fields(objects, "objects")),
        tools=tuple(_read_tool(item, where) for item, where in fields.items("tools")),
        group=fields.text("group", None),
        license=fields.text("license", None),
        answers=tuple(_read_answer(item, where) for item, where in fields.items("answers")),
    )
    fields.done()
    if not record.messages:
        raise BadField("messages", "is empty; a sample needs at least one message")
    return record


def _read_message(fields: Fields) -> Message:
    role = fields.choice("role", ROLES)
    calls = tuple(_read_call(item) for item in fields.objects("tool_calls"))
    content = fields.take("content", (str, list), None)
    if content is None and not calls:
        raise BadField(f"{fields.where}content", "is missing; write text (may be empty) or a list of parts")
    thinking = fields.text("thinking", None)
    reasoning = fields.text("reasoning_content", None)
    if thinking is not None and reasoning is not None:
        raise BadField(f"{fields.where}thinking", "is given twice, as thinking and as reasoning_content; keep one")
    thinking = thinking if thinking is not None else reasoning
    if role != "assistant" and (thinking is not None or calls):
        raise BadField(f"{fields.where}role", f"is {role!r}; only an assistant message has thinking or tool_calls")
    loss = fields.take("loss", (bool, int, float), None)
    if loss is not None and not 0 <= loss <= 1e6:
        raise BadField(f"{fields.where}loss", f"is {loss}; write true, false or a weight from 0 to 1e6")
    fields.done()
    return Message(
        role=role,  # type: ignore[arg-type]  # choice() has checked it against ROLES
        contents=read_contents(content or "", f"{fields.where}content"),
        loss=None if loss is None else float(loss),
        thinking=thinking,
        tool_calls=calls,
    )


def _read_call(fields: Fields) -> ToolCall:
    """Read a call, {"name", "arguments"} or OpenAI's {"type": "function", "function": {...}}; arguments may be text."""
    inner = fields.take("function", Mapping, None)
    if inner is not None:
        fields.choice("type", ("function",), "function")
        fields.text("id", None)
        fields.done()
        fields = Fields(inner, f"{fields.where}function")
    arguments = fields.take("arguments", (Mapping, str), {})
    if isinstance(arguments, str):
        arguments = load_json(arguments)
        if not isinstance(arguments, dict):
            raise BadField(f"{fields.where}arguments", "is text that is not a JSON object")
    check_text(json.dumps(arguments, ensure_ascii=False), f"{fields.where}arguments")
    name = fields.text("name")
    fields.done()
    return ToolCall(name=name, arguments=dict(arguments))


def _read_answer(item: Any, where: str) -> str:
    if not isinstance(item, str):
        raise BadField(where, f"is {item!r:.80}; write an accepted answer as text")
    return check_text(item, where)


def _read_tool(item: Any, where: str) -> dict[str, Any]:
    tool = dict(Fields.take_object(item, where))
    check_text(json.dumps(tool, ensure_ascii=False), where)
    return tool


def _check_marks(record: Record) -> None:
    """Check that there are as many items as marks: mark i takes item i. Boxes and points share one list."""
    objects = record.objects or Objects()
    kinds = [item.kind for message in record.messages for item in message.contents if item.kind != "text"]
    boxes = [kind for kind in kinds if kind in ("bbox", "point")]
    rows = (
        ("images", len(record.images), kinds.count("image"), "<image> mark"),
        ("videos", len(record.videos), kinds.count("video"), "<video> mark"),
        ("objects.ref", len(objects.ref), kinds.count("ref"), "<ref-object> mark"),
        ("objects.bbox", len(objects.boxes), len(boxes), "<bbox> or <point> mark"),
    )
    for name, entries, marks, spelled in rows:
        if entries != marks:
            raise BadField(
                name, f"has {count_of(entries, 'item')}, but the messages contain {count_of(marks, spelled)}"
            )
    for index, (kind, box) in enumerate(zip(boxes, objects.boxes, strict=True)):
        if kind == "point" and len(box) != 2:
            raise BadField(f"objects.bbox[{index}]", f"is {list(box)}, but its mark is <point>; write [x, y]")
    if objects.boxes and not record.images:
        raise BadField("objects.bbox", "has boxes or points but the sample has no image")
    if any(not 0 <= index < len(record.images) for index in objects.image_id):
        raise BadField(
            "objects.image_id",
            f"is {list(objects.image_id)}, but the sample has {count_of(len(record.images), 'image')}",
        )


def _check_members(record: Record, members: Collection[str]) -> None:
    named = media_members(record.images, record.videos)
    missing = sorted(set(named) - set(members))
    if missing:
        raise BadField("media", f"names {missing} but the shard has {sorted(members)} for this key (half a sample?)")
    extra = sorted(set(members) - set(named))
    if extra:
        raise BadField("media", f"does not name {extra}, which the shard holds for this key")


def record_to_json(record: Record) -> dict[str, Any]:
    """Return the JSON object that parses back to an equal record."""
    out: dict[str, Any] = {"v": VERSION, "id": record.id}
    if record.source:
        out["source"] = record.source
    for name in ("group", "license"):
        if (value := getattr(record, name)) is not None:
            out[name] = value
    out["messages"] = [_message_to_json(message) for message in record.messages]
    if record.images:
        out["images"] = [image.to_json() for image in record.images]
    if record.videos:
        out["videos"] = [video.to_json() for video in record.videos]
    if record.objects:
        out["objects"] = record.objects.to_json()
    if record.tools:
        out["tools"] = list(record.tools)
    if record.answers:
        out["answers"] = list(record.answers)
    return out


def _message_to_json(message: Message) -> dict[str, Any]:
    out: dict[str, Any] = {"role": message.role, "content": write_contents(message.contents)}
    if message.loss is not None:
        out["loss"] = message.loss
    if message.thinking is not None:
        out["thinking"] = message.thinking
    if message.tool_calls:
        out["tool_calls"] = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
    return out
