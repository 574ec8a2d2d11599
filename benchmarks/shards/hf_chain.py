"""The peer of `data-throughput`, in its own process: webdataset's pipeline and transformers' processors.

torchvision's wheel needs CUDA's libraries for operators that resizing does not use. If it cannot load them, they are
declared here by name only, before transformers is imported; therefore nothing else runs in this process.
It is started with torchvision's folder on the path, and answers "run" and "outputs" on its standard input.
"""

import io
import os
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import torch
import webdataset
from PIL import Image

Output = dict[str, Any]


def chain(processor: Any, shard: str) -> Iterator[Output]:
    """Yield every sample of the shard as the processor returns it for the model."""
    pipeline = webdataset.WebDataset(shard, shardshuffle=False, nodesplitter=None, empty_check=False).decode()
    for sample in pipeline:
        record = sample["json"]
        images: list[Image.Image] = []
        videos: list[Any] = []
        metadata: list[dict[str, Any]] = []
        messages = [{**message, "content": _parts(message["content"])} for message in record["messages"]]
        for member in record.get("images", []):
            images.append(Image.open(io.BytesIO(sample[member])).convert("RGB"))
        for member in record.get("videos", []):
            frames, described = _read_video(sample[member], processor.video_processor)
            videos.append(frames)
            metadata.append(described)
        text = processor.apply_chat_template(messages, tokenize=False)
        features = processor(
            text=[text],
            images=images or None,
            videos=videos or None,
            video_metadata=metadata or None,
            do_sample_frames=False,
            cap_pixels_per_frame=True,
            return_tensors="pt",
        )
        yield {name: value.numpy() for name, value in features.items() if hasattr(value, "numpy")}


def _parts(content: str) -> list[dict[str, str]]:
    """Return the placeholders at the start of a content as objects, then its text."""
    contents = []
    for kind in ("image", "video"):
        while content.startswith(f"<{kind}>"):
            contents.append({"type": kind})
            content = content.removeprefix(f"<{kind}>")
    return [*contents, {"type": "text", "text": content}]


def _read_video(data: bytes, video_processor: Any) -> tuple[Any, dict[str, Any]]:
    """Return the processor's frames, decoded from the start, as its only reader other than torchcodec does."""
    from transformers.video_utils import VideoMetadata

    with av.open(io.BytesIO(data), mode="r") as container:
        stream = container.streams.video[0]
        rate, total = float(stream.average_rate or 1), stream.frames
        numbers = video_processor.sample_frames(VideoMetadata(total_num_frames=total, fps=rate)).tolist()
        frames = []
        for number, frame in enumerate(container.decode(stream)):
            if number > numbers[-1]:
                break
            if number in numbers:
                frames.append(frame.to_ndarray(format="rgb24"))
    return np.stack(frames), {"fps": rate, "total_num_frames": total, "frames_indices": numbers}


def main() -> None:
    """Answer requests; arguments: folder of the base, shard, backend of the image processor, most pixels per image."""
    folder, shard, backend, most = sys.argv[1:]
    torch.set_num_threads(1)
    if not torch.version.cuda:
        library: Any = torch.library
        library = library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from transformers import AutoProcessor, Qwen2VLImageProcessor, Qwen2VLImageProcessorPil

    processor = AutoProcessor.from_pretrained(folder)
    kind = Qwen2VLImageProcessorPil if backend == "pil" else Qwen2VLImageProcessor
    processor.image_processor = kind.from_pretrained(folder)
    processor.image_processor.size["longest_edge"] = int(most)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may write to the stream of answers
    for request in sys.stdin:
        made = list(chain(processor, shard))
        pickle.dump(made if request.strip() == "outputs" else len(made), answers)
        answers.flush()


if __name__ == "__main__":
    main()
