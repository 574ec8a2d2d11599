"""Tiny models for the expert-parallel tests; every dimension differs from every other."""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

VOCAB = 176


def vl_config(*, hidden: int = 48, experts: int = 8, intermediate: int = 40, top_k: int = 2, layers: int = 2, **text):
    return Qwen3VLMoeConfig(
        text_config=dict(
            vocab_size=VOCAB, hidden_size=hidden, intermediate_size=56, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, moe_intermediate_size=intermediate, num_experts=experts,
            num_experts_per_tok=top_k, max_position_embeddings=4096, tie_word_embeddings=False,
            rope_parameters=dict(
                rope_type="default", rope_theta=5e6, mrope_section=[6, 5, 5], mrope_interleaved=True
            ),
        ) | text,
        vision_config=dict(
            depth=3, hidden_size=36, num_heads=2, intermediate_size=44, patch_size=4, temporal_patch_size=2,
            spatial_merge_size=2, out_hidden_size=hidden, deepstack_visual_indexes=[0, 1], num_position_embeddings=64,
            in_channels=3,
        ),
        image_token_id=170, video_token_id=171, vision_start_token_id=172, vision_end_token_id=173,
        tie_word_embeddings=False,
    )  # fmt: skip


def vl_model(*, seed: int = 0, dtype: torch.dtype = torch.float32, **config) -> Qwen3VLMoeForConditionalGeneration:
    """A Qwen3-VL-MoE with larger weights than a fresh one has, so that every part matters for the loss."""
    torch.manual_seed(seed)
    model = Qwen3VLMoeForConditionalGeneration(vl_config(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model.to(dtype)


def text_model(*, seed: int = 0, **config) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    keys = dict(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, moe_intermediate_size=40, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(keys | config)))
