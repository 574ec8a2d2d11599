"""Shapes in time: the steps of an agent, captions of moments, clips of a video."""

import json
from collections.abc import Mapping
from typing import Any

from data.format.fields import BadField
from data.rows.chats import assistant, user

PAST_SCREENS = 3
"""Screens of earlier steps that a step shows, unless the row says otherwise in `past_screens`."""
_GOALS = ("goal", "task", "instruction", "query", "question")
_SCREENS = ("screenshot", "screen", "image", "observation")
_SCREEN_LISTS = ("screens", "screenshots", "images")
_SPANS = (("start", "end"), ("start_time", "end_time"), ("start_sec", "end_sec"), ("clip_start", "clip_end"))
_SPAN_PAIRS = ("span", "clip", "time", "timestamp")
SPAN_COLUMNS = (*(name for pair in _SPANS for name in pair), *_SPAN_PAIRS)


def goal_of(row: Mapping[str, Any]) -> str | None:
    """Return the name of the column that says what the agent is to do."""
    return next((name for name in _GOALS if isinstance(row.get(name), str)), None)


def has_steps(row: Mapping[str, Any]) -> bool:
    """Say whether the row holds the screens and actions of an agent."""
    if goal_of(row) is None:
        return False
    steps = row.get("steps")
    if isinstance(steps, list) and steps and isinstance(steps[0], Mapping):
        return any(name in steps[0] for name in _SCREENS) and "action" in steps[0]
    return isinstance(row.get("actions"), list) and any(isinstance(row.get(name), list) for name in _SCREEN_LISTS)


def trajectory(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a sample for each step: its screen, and a window of earlier ones; only its own action is learned."""
    goal = goal_of(row)
    assert goal is not None, "has_steps looks first"
    steps = _steps(row)
    window = row.get("past_screens", PAST_SCREENS)
    if type(window) is not int or window < 0:
        raise BadField("past_screens", f"is {window!r:.80}; write a whole number of screens")
    samples = []
    for at in range(len(steps)):
        first = max(0, at - window)
        gone = "".join(f"\n{number}. {action}" for number, (_, action) in enumerate(steps[:first], 1))
        text = row[goal] + (f"\nEarlier actions:{gone}" if gone else "") + "\n"
        messages = []
        for number, (_, action) in enumerate(steps[first : at + 1], first):
            messages.append(user((text if number == first else "") + "<image>"))
            messages.append({**assistant(action), "loss": number == at})
        samples.append({"messages": messages, "images": [screen for screen, _ in steps[first : at + 1]]})
    return samples


def _steps(row: Mapping[str, Any]) -> list[tuple[Any, str]]:
    """Return the screen and the action of each step."""
    if row.get("steps"):
        pairs = []
        for at, step in enumerate(row["steps"]):
            screen = (
                next((step[name] for name in _SCREENS if step.get(name)), None) if isinstance(step, Mapping) else None
            )
            if screen is None or step.get("action") is None:
                raise BadField(f"steps[{at}]", f"is {step!r:.80}; write an object with a screenshot and an action")
            pairs.append((screen, _action(step["action"])))
        return pairs
    screens = next(row[name] for name in _SCREEN_LISTS if isinstance(row.get(name), list))
    actions = row["actions"]
    if len(screens) - len(actions) not in (0, 1):  # some sets keep the screen that follows the last action
        raise BadField("actions", f"has {len(actions)} entries for {len(screens)} screens; write one for each screen")
    return list(zip(screens, map(_action, actions), strict=False))


def _action(action: Any) -> str:
    return action if isinstance(action, str) else json.dumps(action, ensure_ascii=False)


def moments(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read a video with sentences and the seconds of each: the bare video is answered by a line for each moment."""
    times, sentences = row["timestamps"], row["sentences"]
    if not isinstance(sentences, list) or len(times) != len(sentences):
        raise BadField("timestamps", "must be a list with [start, end] for each of sentences")
    lines = []
    for at, (span, sentence) in enumerate(zip(times, sentences, strict=True)):
        start, end = _span(span, f"timestamps[{at}]")
        lines.append(f"{start:.1f} - {end:.1f} seconds: {str(sentence).strip()}")
    return {"messages": [user(""), assistant("\n".join(lines))]}


def with_clip(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with a start and an end moved into its video, so that only these seconds are shown."""
    video = row.get("video")
    if not isinstance(video, (str, Mapping)) or isinstance(row.get("timestamps"), list):
        return dict(row)
    for pair in _SPANS:
        if all(row.get(name) is not None for name in pair):
            return _cut(row, video, _span([row[name] for name in pair], pair[0]), pair)
    for name in _SPAN_PAIRS:
        if isinstance(row.get(name), list):
            return _cut(row, video, _span(row[name], name), (name,))
    return dict(row)


def _cut(row: Mapping[str, Any], video: Any, span: tuple[float, float], columns: tuple[str, ...]) -> dict[str, Any]:
    place = {"path": video} if isinstance(video, str) else dict(video)
    rest = {name: value for name, value in row.items() if name not in columns}
    return {**rest, "video": {**place, "start": span[0], "end": span[1]}}


def _span(value: Any, where: str) -> tuple[float, float]:
    try:
        start, end = map(float, value)
    except (TypeError, ValueError) as error:
        raise BadField(where, f"is {value!r:.80}; write [start, end] in seconds") from error
    return start, end
