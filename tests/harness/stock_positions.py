"""Positions as transformers computes them."""

import torch
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeModel


def build_model():
    text = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3VLMoeConfig(text_config=text, vision_config={"depth": 1, "deepstack_visual_indexes": [0]})
    with torch.device("meta"):
        return Qwen3VLMoeModel(config)


def theirs(model, kinds, images, videos):
    positions, _ = model.get_rope_index(
        torch.zeros(1, len(kinds), dtype=torch.long),
        torch.from_numpy(kinds).long().unsqueeze(0),
        torch.from_numpy(images) if len(images) else None,
        torch.from_numpy(videos) if len(videos) else None,
    )
    return positions[:, 0].numpy()
