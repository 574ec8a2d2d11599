"""Small base folders for tests: models built by transformers and written by our writer."""

from pathlib import Path

import torch
from tiny_moe import vl_config
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from finetune.files.writer import write_model


def write_base(model: torch.nn.Module, folder: Path, *, shard_bytes: int = 100_000) -> Path:
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16"}
    write_model(
        folder,
        tensors.items(),
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtypes={name: kinds[tensor.dtype] for name, tensor in tensors.items()},
        config=model.config.to_dict() | {"architectures": [type(model).__name__]},
        side_files={},
        shard_bytes=shard_bytes,
    )
    return folder


def dense_model(*, seed: int = 0, tied: bool = False) -> torch.nn.Module:
    """Return a Qwen3-VL without experts, with the dimensions of `vl_config`."""
    moe = vl_config()
    text = {key: value for key, value in moe.text_config.to_dict().items() if "expert" not in key and "moe" not in key}
    text.pop("model_type")
    vision = {key: value for key, value in moe.vision_config.to_dict().items() if key != "model_type"}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=tied, **{key: getattr(moe, key) for key in ids}
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model
