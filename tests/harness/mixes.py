"""Records of every mix with real media, as a shard returns them."""

import io
from functools import cache

import numpy as np
from bases import base
from media_files import clip, decode_all, encode, moving, picture
from PIL import Image

from data.config import VideoConfig
from data.format.record import parse_record
from data.render.frames import probe_video
from data.render.image import probe_image
from data.render.video import frame_list_facts, plan_video
from data.render.vision import read_spec

MIXES = {
    "text": {"messages": [("user", "What is a horse?"), ("assistant", "A tall animal. 一种高大的动物。")]},
    "image": {"messages": [("user", "<image>What is this?"), ("assistant", "A pattern.")], "images": ["0.png"]},
    "images in between": {
        "messages": [
            ("system", "Be brief."),
            ("user", "Compare <image> with <image>, please."),
            ("assistant", "The first is wider."),
            ("user", "And <image>?"),
            ("assistant", "Smaller."),
        ],
        "images": ["0.png", "1.jpg", "2.png"],
    },
    "video": {"messages": [("user", "<video>\nWhat moves?"), ("assistant", "All of it.")], "videos": ["3.mp4"]},
    "range": {
        "messages": [("user", "When? <video>"), ("assistant", "Between 1 and 2 s.")],
        "videos": [{"member": "3.mp4", "start": 1.0, "end": 2.5, "fps": 4, "time_origin": "video"}],
    },
    "image and videos": {
        "messages": [
            ("user", "First <video> then <image>"),
            ("assistant", "Seen."),
            ("user", "<video><image> and now?"),
            ("assistant", "Seen too.\n"),
        ],
        "images": ["0.png", "1.jpg"],
        "videos": [{"member": "3.mp4", "num_frames": 5}, {"member": "4.mkv", "fps": 1}],
    },
    "tools": {
        "messages": [
            ("user", "Look it up."),
            ("assistant", "", {"tool_calls": [{"name": "look", "arguments": {"at": "it"}}]}),
            ("tool", "found <image>"),
            ("assistant", "A pattern."),
        ],
        "images": ["1.jpg"],
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}],
    },
}
OWN_MIXES = {  # mixes that the model's own template cannot render, or that transformers cannot process
    "document": {
        "messages": [("assistant", "A text <image> goes on <video> and ends <image>")],
        "images": ["0.png", "1.jpg"],
        "videos": ["4.mkv"],
    },
    "frames": {
        "messages": [("user", "<video> what?"), ("assistant", "This.")],
        "videos": [{"frames": ["0.png", "5.png", "0.png"], "times": [0.0, 3.0, 3.5]}],
    },
    "varying": {"messages": [("user", "<video>"), ("assistant", "This.")], "videos": ["6.mp4"]},
    "single": {
        "messages": [("user", "<video>"), ("assistant", "Still.")],
        "videos": [{"member": "3.mp4", "start": 0.5, "end": 0.55}],
    },
    "boxes": {
        "messages": [("user", "<image>Where is <ref-object>?"), ("assistant", 'At {"bbox_2d": <bbox>}, <point>.')],
        "images": ["0.png"],
        "objects": {"ref": ["the <|im_end|> mark"], "bbox": [[200, 75, 400, 150], [100, 300]], "bbox_type": "real"},
    },
}


@cache
def media():
    """Return the bytes of every medium in the mixes."""
    return {
        "0.png": encode(Image.fromarray(picture(300, 400, 0))),
        "1.jpg": encode(Image.fromarray(picture(250, 200, 1)), "JPEG"),
        "2.png": encode(Image.fromarray(picture(700, 800, 2))),
        "3.mp4": clip(moving(75), rate=25),
        "4.mkv": clip(moving(60, 128, 64), rate=30, kind="matroska"),
        "5.png": encode(Image.fromarray(picture(300, 400, 5))),
        "6.mp4": clip(moving(6), times=[0, 0.1, 0.3, 2.0, 2.1, 6.0]),
    }


def record(name):
    """Return the record of a mix."""
    raw = {**MIXES, **OWN_MIXES}[name]
    messages = [{"role": role, "content": text, **(more[0] if more else {})} for role, text, *more in raw["messages"]]
    return parse_record({"v": 1, **raw, "messages": messages}, shard="s", key=name)


def files(of):
    """Return (images, videos) in the form for `Renderer.build`."""
    images = [media()[ref.member] for ref in of.images]
    videos = [
        [media()[frame.member] for frame in ref.frames] if ref.frames else media()[ref.member] for ref in of.videos
    ]
    return images, videos


def built(renderer, name, **options):
    """Return the sample of a mix."""
    return renderer.build(record(name), *files(record(name)), key=name, **options)


def facts(of):
    images, videos = files(of)
    sizes = [probe_image(data) for data in images]
    clips = [
        probe_video(data) if isinstance(data, bytes) else frame_list_facts(ref, [probe_image(frame) for frame in data])
        for ref, data in zip(of.videos, videos, strict=True)
    ]
    return sizes, clips


def asked(name):
    """Return the same mix as arguments of the processor, with frames chosen by our plan."""
    of = record(name)
    turns = []
    for message in of.messages:
        parts = [
            {"type": part.kind, **({"text": part.text} if part.kind == "text" else {})} for part in message.contents
        ]
        turn = {"role": message.role, "content": parts or ""}
        if message.tool_calls:
            turn["tool_calls"] = [{"type": "function", "function": vars(call)} for call in message.tool_calls]
        turns.append(turn)
    videos, metadata = [], []
    for ref, found in zip(of.videos, facts(of)[1], strict=True):
        plan = plan_video(ref, found, spec=read_spec(base()), config=VideoConfig())
        every = decode_all(media()[ref.member])
        videos.append([every[number] for number in plan.frames])
        metadata.append({"fps": found.rate, "total_num_frames": found.frames, "frames_indices": list(plan.frames)})
    images = [Image.open(io.BytesIO(media()[ref.member])).copy() for ref in of.images]
    return {
        "messages": turns,
        "images": images,
        "videos": [np.stack(video) for video in videos],
        "metadata": metadata,
        "tools": list(of.tools) or None,
    }
