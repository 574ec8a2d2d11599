"""The small files next to a model's weights: generation defaults, tokenizer, chat template and processor settings.

With the token ids of the published models, every function returns the published file byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from finetune.architecture.families import Family
from finetune.files.jsonblock import load_json

# In the order of ids, right after the base vocabulary. Tokens of the second group are not marked as "special", so
# readers that skip special tokens keep them.
_SPECIAL = """
    endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end
    vision_start vision_end vision_pad image_pad video_pad
"""
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in _SPECIAL.split())
_PLAIN = """
    <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>
    <tool_response> </tool_response> <think> </think>
"""
PLAIN_TOKENS = tuple(_PLAIN.split())


def added_token_ids(first: int) -> dict[str, int]:
    """Return the ids of Qwen's added tokens, given the number of entries in the base vocabulary."""
    return {token: first + at for at, token in enumerate(SPECIAL_TOKENS + PLAIN_TOKENS)}


def chat_template() -> str:
    """Return Qwen3-VL's own chat template, as in its repositories."""
    return files("finetune").joinpath("assets", "chat_template.jinja").read_text(encoding="utf-8")


def side_files(family: Family, first_added_token: int, *, image_min_tokens: int = 64) -> dict[str, bytes]:
    """Return all files of a model folder except weights, config.json and vocabulary: file name -> content.

    Images of fewer than `image_min_tokens` are enlarged; the published models use 64, which is 256 x 256 pixels.
    """
    vision = family.vision
    patches = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    area = (vision.patch_size * vision.spatial_merge_size) ** 2  # pixels of one token
    # The budgets count pixels, of one image or of all frames of a clip.
    image = {"size": {"longest_edge": 16_777_216, "shortest_edge": image_min_tokens * area}, **patches}
    video = {"size": {"longest_edge": 25_165_824, "shortest_edge": 4_096}, **patches}
    return {
        "chat_template.json": _json({"chat_template": chat_template()}, indent=4),
        "generation_config.json": _json(_generation(family), indent=4),
        "preprocessor_config.json": _json(image | {"image_processor_type": "Qwen2VLImageProcessorFast"}, indent=4),
        "tokenizer_config.json": _json(_tokenizer(family, first_added_token), indent=2),
        "video_preprocessor_config.json": _json(video | {"video_processor_type": "Qwen3VLVideoProcessor"}, indent=4),
    }


def _generation(family: Family) -> dict[str, Any]:
    end_of_text = family.text.bos_token_id  # one token with three roles: begin, padding, and a second end
    return {
        "bos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "do_sample": True,
        "eos_token_id": [family.text.eos_token_id, end_of_text],
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.0,
        "temperature": 0.7,
        "transformers_version": "4.56.0",
    }


def _tokenizer(family: Family, first_added_token: int) -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(number): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token in SPECIAL_TOKENS,
            }
            for token, number in added_token_ids(first_added_token).items()
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": chat_template(),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": family.text.max_position_embeddings,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _json(content: Mapping[str, Any], *, indent: int) -> bytes:
    return json.dumps(content, indent=indent, ensure_ascii=False).encode()


def stop_tokens(folder: Path) -> frozenset[int]:
    """Return the tokens that end an answer according to the base's generation settings."""
    tokens: Any = None
    if (folder / "generation_config.json").is_file():
        tokens = load_json(folder / "generation_config.json").get("eos_token_id")
    if tokens is None:
        config = load_json(folder / "config.json")
        tokens = config.get("text_config", config).get("eos_token_id")
    if tokens is None:
        raise ValueError(
            f"{folder}: neither generation_config.json nor config.json says which token ends an answer "
            f"(eos_token_id). Copy generation_config.json from the release that the weights came from"
        )
    return frozenset(tokens if isinstance(tokens, list) else [tokens])
