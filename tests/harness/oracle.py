"""References in a process apart: transformers' own processors (with torchvision), Kubeflow's models, bitsandbytes.

torchvision's CUDA wheel fails to import with a CPU torch, and a torchvision that fails to import breaks transformers'
models too. So it is installed outside the environment, in `<sys.prefix>/oracle`, which only this process uses:

    pip install --no-deps --target <environment>/oracle torchvision==0.28.0 bitsandbytes==0.50.2

Kubeflow's models of a PyTorchJob bring Kubernetes' client, of which only these are needed: it lies there as well. So
does bitsandbytes, which PEFT would import in every process.
"""

import atexit
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from limits import LIMIT_S

FOLDER = Path(sys.prefix) / "oracle"


def ask(function, /, **arguments):
    """Run one of the functions below in the reference process, and return its result."""
    package = {manifest: "kubeflow", quantised: "bitsandbytes"}.get(function, "torchvision")
    if not (FOLDER / package).is_dir():
        pytest.skip(f"no {package} in {FOLDER}: run `make test`, or install it there as tests/harness/oracle.py says")
    process = _start()
    pickle.dump((function.__name__, arguments), process.stdin)
    process.stdin.flush()
    answer = pickle.load(process.stdout)  # written by our own child
    if isinstance(answer, Exception):
        raise answer
    return answer


@cache
def _start():
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(FOLDER), "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"},
    )
    atexit.register(_stop, process)
    return process


def _stop(process):
    process.stdin.close()
    process.stdout.close()
    process.wait(timeout=LIMIT_S)


def quantised(*, weight, bits):
    """Return what bitsandbytes makes of a float32 matrix: codes, scales, and values in float32 and bfloat16."""
    import bitsandbytes.functional as bnb
    import torch

    weight = torch.from_numpy(weight)
    if bits == "int8":
        codes, largest, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight.half(), 0.0)
        return {"codes": codes.numpy(), "scales": largest.numpy() / 127}
    if bits == "scales":
        codes, state = bnb.quantize_blockwise(weight, blocksize=256)
        return {"codes": codes.numpy(), "scales": state.absmax.numpy(), "table": state.code.numpy()}
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    values = bnb.dequantize_4bit(codes, state).numpy()
    state.dtype = torch.bfloat16
    return {
        "codes": codes.flatten().numpy(),
        "scale codes": state.absmax.flatten().numpy(),
        "scales": state.state2.absmax.numpy(),
        "offset": state.offset.numpy()[None],
        "values": values,
        "bfloat16": bnb.dequantize_4bit(codes, state).view(torch.int16).numpy(),
    }


def images(*, pictures, size):
    """Return pixel_values and grids of arrays [H, W, 3] or PIL images."""
    from transformers import Qwen2VLImageProcessor

    half = [0.5] * 3
    processor = Qwen2VLImageProcessor(size=size, patch_size=16, image_mean=half, image_std=half)
    assert processor.backend == "torchvision"
    found = processor(pictures, return_tensors="pt")
    return found["pixel_values"].numpy(), found["image_grid_thw"].tolist()


def video(*, frames, size, cap, max_frame_tokens=768):
    """Return pixel_values and grid of frames [N, H, W, 3], without sampling."""
    from transformers import Qwen3VLVideoProcessor

    processor = Qwen3VLVideoProcessor(size=size, cap_pixels_per_frame=cap, max_video_tokens=max_frame_tokens)
    n = len(frames)
    metadata = [{"fps": 30.0, "total_num_frames": n, "frames_indices": list(range(n))}]
    found = processor(frames, do_sample_frames=False, video_metadata=metadata, return_tensors="pt")
    return found["pixel_values_videos"].numpy(), found["video_grid_thw"].tolist()


def sampled(*, total, rate, fps=None, num_frames=None, min_frames=4, max_frames=768):
    """Return the frame numbers that transformers picks."""
    from transformers import Qwen3VLVideoProcessor
    from transformers.video_utils import VideoMetadata

    processor = Qwen3VLVideoProcessor(min_frames=min_frames, max_frames=max_frames)
    metadata = VideoMetadata(total_num_frames=total, fps=rate)
    return processor.sample_frames(metadata, num_frames=num_frames, fps=fps).tolist()


def conversation(*, folder, messages, images=(), videos=(), metadata=(), tools=None, cap=True, prompt=False):
    """Return the processor's complete output for a conversation whose frames are already chosen."""
    processor = _processor(folder)
    text = processor.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    found = processor(
        text=[text],
        images=list(images) or None,
        videos=[list(video) for video in videos] or None,
        video_metadata=[dict(each) for each in metadata] or None,
        do_sample_frames=False,
        cap_pixels_per_frame=cap,
        return_tensors="pt",
    )
    return {name: value.numpy() for name, value in found.items() if hasattr(value, "numpy")}


def grids(*, folder, pictures, frames, rate):
    """Return the grids of images and of a complete video, with the settings in a folder's files alone."""
    processor = _processor(folder)
    image = processor.image_processor(pictures, return_tensors="pt")["image_grid_thw"].tolist()
    metadata = [{"fps": rate, "total_num_frames": len(frames), "duration": len(frames) / rate}]
    made = processor.video_processor([frames], video_metadata=metadata, return_tensors="pt", do_sample_frames=True)
    return image, made["video_grid_thw"].tolist()


def decoded(*, folder, ids):
    """Return the text of tokens, as a server sends it."""
    return _processor(folder).tokenizer.decode(ids, skip_special_tokens=True)


def manifest(*, manifest, kind):
    """A manifest as Kubeflow's and Kubernetes' clients read it and would send it on: unknown keys are gone."""
    import kubeflow.training.models
    from kubeflow.training import ApiClient

    client = ApiClient()
    made = client._ApiClient__deserialize(manifest, getattr(kubeflow.training.models, kind))
    return client.sanitize_for_serialization(made)


@cache
def _processor(folder):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def main():
    import torch

    torch.set_num_threads(1)
    if "+cpu" in torch.__version__:  # the wheel's compiled operators need CUDA's libraries, but resizing does not
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may write to the stream of answers
    while True:
        try:
            name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = globals()[name](**arguments)
        except Exception as error:  # noqa: BLE001  every error is passed to the caller
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
