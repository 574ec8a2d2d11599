"""Tiny models for the expert-parallel tests, and a plain model as their reference.

All dimensions differ, so that a tensor in the wrong layout has the wrong shape or values.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from moe import reference
from moe.experts import ExpertLora, GroupedExperts
from moe.router import Router, RouterOptions

VOCAB, IMAGE, VIDEO, START, END = 176, 170, 171, 172, 173
LORA = ExpertLora(r=8, alpha=12)
PATCH = 3 * 2 * 4 * 4
ROWS = 4


def vl_config(*, hidden: int = 48, experts: int = 12, intermediate: int = 40, top_k: int = 2, layers: int = 2) -> Any:
    text = dict(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=56,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=intermediate,
        num_experts=experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[6, 5, 5], mrope_interleaved=True),
    )
    vision = dict(
        depth=3,
        hidden_size=72,
        num_heads=2,
        intermediate_size=44,
        patch_size=4,
        temporal_patch_size=2,
        spatial_merge_size=2,
        out_hidden_size=hidden,
        deepstack_visual_indexes=[0, 1],
        num_position_embeddings=64,
        in_channels=3,
    )
    ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)


def vl_model(*, seed: int = 0, **config: int) -> Any:
    """Return a Qwen3-VL-MoE with larger weights than usual, so that each part affects the loss."""
    torch.manual_seed(seed)
    model = Qwen3VLMoeForConditionalGeneration(vl_config(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model


def text_model(*, seed: int = 0, **config: Any) -> Any:
    torch.manual_seed(seed)
    keys = dict(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=40,
        num_experts=12,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(keys | config)))


def media_batch(rows: slice) -> dict[str, Tensor]:
    """Return rows of text around one image and a video of two frames; odd rows have no image."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 160, (ROWS, 30), generator=generator)
    for row in ids:
        row[3], row[4:8], row[8] = START, IMAGE, END
        row[12], row[13:17], row[17], row[19], row[20:24], row[24] = START, VIDEO, END, START, VIDEO, END
    pictures = torch.randn(ROWS, 16, PATCH, generator=generator)
    frames = torch.randn(ROWS, 32, PATCH, generator=generator)
    ids = ids[rows]
    count = ids.shape[0]
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        "pixel_values": pictures[rows].flatten(0, 1),
        "image_grid_thw": torch.tensor([[1, 4, 4]]).repeat(count, 1),
        "pixel_values_videos": frames[rows].flatten(0, 1),
        "video_grid_thw": torch.tensor([[2, 4, 4]]).repeat(count, 1),
    }


def batch(rows: int = 8, length: int = 24) -> dict[str, Tensor]:
    """Return rows of text with one image each: 4 tokens of 16 patches."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 160, (rows, length), generator=generator)
    ids[:, 3], ids[:, 4:8], ids[:, 8] = START, IMAGE, END
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(rows, 16, PATCH, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]).expand(rows, 3).contiguous(),
    }


def rows_of(data: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    part = {key: value[rows] for key, value in data.items()}
    return part | {"pixel_values": part["pixel_values"].flatten(0, 1)}


def token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the sum of losses over next tokens, except those of images."""
    labels = ids[:, 1:].masked_fill(ids[:, 1:] >= IMAGE, -100)
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), reduction="sum")


def token_count(ids: Tensor) -> int:
    return int((ids[:, 1:] < IMAGE).sum())


class PlainMoe(nn.Module):
    """All experts of a block on one rank, computed by moe/reference.py, with parameters under our names."""

    def __init__(self, name: str, block: Any, router: RouterOptions, experts: str, seed: int) -> None:
        super().__init__()
        self.name, self.router, self.top_k = name, router, block.gate.top_k
        _, hidden, intermediate = block.experts.down_proj.shape
        lora = LORA if experts == "lora" else None
        common: dict[str, Any] = dict(resident=False, seed=seed, dtype=torch.float32)
        self.experts = GroupedExperts(
            name=f"{name}.experts",
            num_experts=len(block.gate.weight),
            local_experts=range(len(block.gate.weight)),
            hidden=hidden,
            intermediate=intermediate,
            mode=experts,
            lora=lora,
            **common,
        )
        self.gate = Router(
            name=f"{name}.gate", num_experts=len(block.gate.weight), hidden=hidden, options=router, **common
        )
        start_factors(self)
        with torch.no_grad():
            self.experts.gate_up.copy_(block.experts.gate_up_proj)
            self.experts.down.copy_(block.experts.down_proj)
            self.gate.weight.copy_(block.gate.weight)
        self.base = block.gate.weight.detach().clone()
        self.logits_bias: Tensor | float = 0.0
        self.routing: Any = None
        self.input: Any = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.input = hidden
        x_TD, gate_ED, e = hidden.flatten(0, -2), self.gate.weight, self.experts
        if self.router.mode == "lora":
            gate_ED = gate_ED + self.router.alpha / self.router.r * self.gate.lora_B @ self.gate.lora_A
        logits = x_TD @ gate_ED.T + self.logits_bias
        self.routing = reference.route(logits, torch.eye(len(gate_ED)), top_k=self.top_k)
        factors = None
        if e.lora is not None:
            factors = reference.Factors(
                gate_up_A=e.gate_up_lora_A,
                gate_up_B=e.gate_up_lora_B,
                down_A=e.down_lora_A,
                down_B=e.down_lora_B,
                scale=e.lora.scale,
            )
        return reference.block(x_TD, self.routing, e.gate_up, e.down, factors).view_as(hidden)

    def agreement(self) -> float:
        """Return the share of the last choices that the weight from before training makes as well."""
        base = reference.route(self.input.flatten(0, -2), self.base, top_k=self.top_k).topk_TK
        return reference.agreement(self.routing.topk_TK, base, torch.ones(len(base)))


def start_factors(layer: Any) -> None:
    """Set B to non-zero values: with a zero B, half of the gradients vanish."""
    layer.experts.init_lora(b_std=0.05)
    layer.gate.init_lora(b_std=0.05)


def freeze(model: Any) -> None:
    """Train only the norm in front of each attention, so that gradients flow through every block."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("input_layernorm" in name)


def plain_model(model: Any, *, router: RouterOptions, experts: str, seed: int) -> list[PlainMoe]:
    """Put PlainMoe into every decoder layer of a model that has already been frozen."""
    blocks = []
    for number, layer in enumerate(model.model.language_model.layers):
        layer.mlp = PlainMoe(f"model.language_model.layers.{number}.mlp", layer.mlp, router, experts, seed)
        blocks.append(layer.mlp)
    return blocks
