"""Conversations to serve, by kind: pictures, several of them, turns, videos at odd frame rates, tools, thinking."""

import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

KINDS = ("images", "several images", "turns", "videos", "tools")
"""The questions to every model; a thinking model gets THINKING as well."""
THINKING = "thinking"
ODD_TOOLS = "tools without a description"
RATES = {"29.97": Fraction(30000, 1001), "12.5": Fraction(25, 2), "7": Fraction(7)}
"""Frames a second of the three videos."""

Turns = list[dict[str, Any]]


def write_rows(folder: Path) -> dict[str, Path]:
    """Write pictures, videos and a file of rows for each kind; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (height, width) in enumerate(((300, 400), (250, 200), (420, 640), (64, 96))):
        Image.fromarray(_picture(height, width, number)).save(folder / f"{number}.png")
    for number, rate in enumerate(RATES.values()):
        (folder / f"{number}.mp4").write_bytes(_clip(rate, frames=40 + 11 * number))
    files = {}
    rest = {"tools": _tools(), ODD_TOOLS: _tools(description=None), THINKING: _thinking()}
    for kind, rows in {**_looking(), **rest}.items():
        files[kind] = folder / f"{kind.replace(' ', '-')}.jsonl"
        files[kind].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def write_text_rows(folder: Path) -> Path:
    """Write conversations without media; return their file."""
    brief = {"role": "system", "content": "Be brief."}
    rows = [
        _row(_said("Count to two.", "One, two.")),
        _row([*_said("Count to two.", "One, two."), *_said("And on? 一二", "Three, four.")]),
        _row([brief, *_said("What is a wave?", "It moves.")]),
        _row([*_said("Name three colours, please.", "Red."), *_said("Only three?", "Blue.")]),
    ]
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _looking() -> dict[str, list[dict[str, Any]]]:
    """Return the rows about pictures and videos."""
    images = [_row(_said(f"<image>What is number {at}?", f"A pattern of kind {at}."), [f"{at}.png"]) for at in range(4)]
    several = [
        _row(_said("Compare <image> with <image>, please.", "The first is wider."), ["0.png", "1.png"]),
        _row(_said("<image><image> and <image>: which is the largest?", "The second."), ["3.png", "2.png", "1.png"]),
    ]
    system = {"role": "system", "content": "Be brief."}
    turns = [
        _row([system, *_said("<image>What is it?", "A wave."), *_said("And <image>?", "A cross.")], ["1.png", "3.png"]),
        _row([*_said("Count to two.", "One, two."), *_said("And on? 一二", "Three, four."), *_said("More.", "Five.")]),
    ]
    videos = [_row(_said("<video>What moves?", "All of it."), videos=[f"{number}.mp4"]) for number in range(len(RATES))]
    mixed = _said("First <video> then <image>: the same?", "It moves more.")
    videos.append(_row(mixed, ["0.png"], videos=["1.mp4"]))
    return {"images": images, "several images": several, "turns": turns, "videos": videos}


def _tools(description: str | None = "Look at a thing") -> list[dict[str, Any]]:
    """Return rows with a tool; its keys stand in the order of OpenAI's protocol, in which servers write them."""
    look: dict[str, Any] = {"name": "look"} | ({"description": description} if description else {})
    look["parameters"] = {"type": "object", "properties": {"at": {"type": "string"}}}
    tools = [{"type": "function", "function": look}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look", "arguments": {"at": "the sea"}}]}
    answered = [
        *_said("Look at the sea.", "")[:1],
        call,
        {"role": "tool", "content": '{"waves": true}'},
        {"role": "assistant", "content": "It has waves."},
    ]
    seen = _said("<image>Look closer if you must.", "No need.")
    return [_row(answered) | {"tools": tools}, _row(seen, ["1.png"]) | {"tools": tools}]


def _thinking() -> list[dict[str, Any]]:
    thought = {"role": "assistant", "content": "Two.", "thinking": "One and one make two."}
    first = [{"role": "user", "content": "<image>How many?"}, thought]
    return [_row(first, ["0.png"]), _row([*first, *_said("And doubled?", "Four.")], ["2.png"])]


def _said(question: str, answer: str) -> Turns:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _row(messages: Turns, images: list[str] | None = None, videos: list[str] | None = None) -> dict[str, Any]:
    return {"messages": messages, "images": images or [], "videos": videos or []}


def _picture(height: int, width: int, seed: int) -> "np.ndarray[Any, Any]":
    """Return smooth colour, edges and noise, the same on every machine."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([(x * 3 + y) % 256, (y * 5) % 256, (x * y // 7) % 256], axis=-1)
    return ((smooth + np.random.default_rng(seed).integers(0, 40, smooth.shape)) % 256).astype(np.uint8)


def _clip(rate: Fraction, *, frames: int) -> bytes:
    """Return a video of a picture that slides."""
    still, buffer = _picture(64, 96, 9), io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = still.shape[:2]
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(still, 4 * number, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
