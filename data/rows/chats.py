"""Shapes of questions and answers: a row to turns."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from data.format.fields import BadField
from data.rows.columns import text_at

_QWEN_VL = re.compile(
    r"<img>\s*(?P<image>[^<]+?)\s*</img>"
    r"|(?:<ref>(?P<ref>[^<]*)</ref>\s*)?<box>(?P<box>(?:\s*\(\s*\d+\s*,\s*\d+\s*\)\s*,?)+)\s*</box>"
)
_CAPTIONS = ("text", "caption", "txt")


def user(content: Any) -> dict[str, Any]:
    """Return a turn of the user."""
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    """Return a turn of the assistant."""
    return {"role": "assistant", "content": content}


def turns_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read messages or conversations as they are."""
    name = next(name for name in ("messages", "conversations", "conversation") if row.get(name) is not None)
    if not isinstance(row[name], list):
        raise BadField(name, f"is a {type(row[name]).__name__}; write a list of turns")
    return {"messages": row[name], "where": name}


def alpaca(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read instruction, input, output and history."""
    for name in ("instruction", "input"):
        if not isinstance(row.get(name) or "", str):
            raise BadField(name, f"is {row[name]!r:.80}; write text")
    question = "\n".join(text for text in (row["instruction"], row.get("input")) if text)
    return {"messages": [*_history(row), user(question), assistant(row["output"])]}


def query_response(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read query, response and history, as older versions of ms-swift wrote them."""
    return {"messages": [*_history(row), user(row.get("query") or ""), assistant(row["response"])]}


def _history(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    history = row.get("history") or []
    if not isinstance(history, list):
        raise BadField("history", f"is {history!r:.80}; write [question, answer] pairs")
    turns = []
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadField("history", f"holds {pair!r:.80}; write [question, answer] pairs")
        turns += [user(pair[0]), assistant(pair[1])]
    return turns


def prompt_completion(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read TRL's prompt and completion: text, or lists of messages."""
    prompt, completion = row["prompt"], row["completion"]
    before = prompt if isinstance(prompt, list) else [user(prompt)]
    after = completion if isinstance(completion, list) else [assistant(completion)]
    return {"messages": [*map(_unlearned, before), *after]}


def _unlearned(turn: Any) -> Any:
    """Return a turn of a prompt; an earlier answer in it is not learned."""
    is_answer = isinstance(turn, Mapping) and turn.get("role") == "assistant"
    return {**turn, "loss": False} if is_answer else turn


def question_answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read question and answer; of a list of answers, the most frequent is learned and all are accepted."""
    answer, listed = row.get("answer"), row.get("answers")
    if isinstance(answer, list):
        answer, listed = None, answer
    out: dict[str, Any] = {"answers": None}
    if listed:
        listed = listed if isinstance(listed, list) else [listed]
        texts = [one.get("answer") if isinstance(one, Mapping) else one for one in listed]
        if not all(isinstance(text, str) for text in texts):
            raise BadField("answers", f"is {listed!r:.80}; write a list of texts")
        counts = Counter(texts)
        answer = answer if answer is not None else counts.most_common(1)[0][0]
        out["answers"] = list(counts)
    if not isinstance(answer, str):
        raise BadField("answer", f"is {answer!r:.80}; write text")
    return {**out, "messages": [user(text_at(row, "question")), assistant(answer)]}


def caption(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read an image or a video with its caption, which answers the bare medium."""
    name = next(name for name in _CAPTIONS if row.get(name) is not None)
    texts = row[name] if isinstance(row[name], list) else [row[name]]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadField(name, f"is {row[name]!r:.80}; write text")
    more = {"answers": texts} if len(texts) > 1 else {}
    return {"messages": [user(""), assistant(texts[0].strip())], **more}


def cauldron(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read images with a list of {user, assistant}."""
    messages = []
    for at, turn in enumerate(row["texts"]):
        if not isinstance(turn, Mapping):
            raise BadField(f"texts[{at}]", f"is {turn!r:.80}; write an object with user and assistant")
        messages += [user(text_at(turn, "user")), assistant(text_at(turn, "assistant"))]
    return {"messages": messages}


def qwen_vl(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read Qwen-VL's own text, in which <img>path</img> is an image, and <ref>, <box> name things in the last one."""
    images: list[str] = []
    objects: dict[str, Any] = {"ref": [], "bbox": [], "image_id": [], "bbox_type": "norm1000"}

    def take(mark: re.Match[str]) -> str:
        if mark["image"]:
            images.append(mark["image"])
            return "<image>"
        corners = [int(number) for number in re.findall(r"\d+", mark["box"])]
        if len(corners) not in (2, 4):
            return mark[0]
        objects["bbox"].append(corners)
        objects["image_id"].append(len(images) - 1)
        if mark["ref"]:
            objects["ref"].append(mark["ref"])
        return ("<ref-object>" if mark["ref"] else "") + ("<bbox>" if len(corners) == 4 else "<point>")

    turns = []
    for at, turn in enumerate(turns_of(row)["messages"]):
        if not isinstance(turn, Mapping):
            raise BadField(f"conversations[{at}]", f"is {turn!r:.80}; write a JSON object")
        name = "value" if "value" in turn else "content"
        turns.append({**turn, name: _QWEN_VL.sub(take, text_at(turn, name))})
    return {"messages": turns, "images": images, **({"objects": objects} if objects["bbox"] else {})}
