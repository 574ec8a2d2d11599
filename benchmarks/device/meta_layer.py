"""One decoder layer on the meta device, ours or the stock one, for counting the operations that it launches.

Both have the same attention kernel and PEFT's LoRA on attention. Ours has our expert block, and joins the operations
between products into nodes. The stock layer has transformers' block with grouped_mm, and PEFT's ParamWrapper.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3VLMoeConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeTextDecoderLayer,
    Qwen3VLMoeTextRotaryEmbedding,
)

from benchmarks.device.operations import Operations
from finetune.architecture.families import Text
from finetune.config import AdaptersConfig
from finetune.model.nodes import join_nodes
from finetune.model.varlen import register
from finetune.planner.activations import Recompute
from moe.balance import Balance
from moe.config import BalanceMode
from moe.experts import ExpertLora
from moe.parallel import ExpertParallelMoe, LayerOptions
from moe.recompute import checkpointed, contexts
from moe.router import RouterOptions

META = torch.device("meta")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
DENSE = ["gate_proj", "up_proj", "down_proj"]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


class MetaLayer:
    """A layer with the inputs of its forward: ours, or transformers' with PEFT."""

    def __init__(
        self,
        text: Text,
        adapters: AdaptersConfig,
        *,
        ours: bool = True,
        resident: bool = True,
        balance: BalanceMode = "off",
    ) -> None:
        register()
        self.text, self.ours = text, ours
        config = _config(text)
        with META:
            layer = Qwen3VLMoeTextDecoderLayer(config, 0).to(torch.bfloat16)
            self.rotary = Qwen3VLMoeTextRotaryEmbedding(config)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(adapters.attention.mode == "full" and "self_attn" in name)
        self.balance = Balance(
            mode=balance,
            coefficient=1e-3,
            z_coefficient=0.0,
            layers=1,
            experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            device=META,
        )
        if adapters.attention.mode == "lora":
            experts = not ours and adapters.experts.mode == "lora"
            _adapt(layer, adapters, STACKS if experts else [])
        if ours and text.experts is not None:  # after PEFT, which freezes all existing parameters
            layer.mlp = _block(config, adapters, resident, self.balance)
        if ours:
            join_nodes(layer)
        self.layer: nn.Module = layer.train()

    def count(self, tokens: int, recompute: Recompute) -> tuple[Operations, Operations]:
        """Count forward, and backward including its recompute."""
        x = torch.empty(1, tokens, self.text.hidden_size, dtype=torch.bfloat16, device=META, requires_grad=True)
        cuts = torch.zeros(3, dtype=torch.int32, device=META)
        tables = self.rotary(x.detach(), torch.zeros(3, 1, tokens, dtype=torch.int64, device=META))
        given: dict[str, Any] = {
            "attention_mask": None,
            "position_embeddings": tables,
            "cu_seq_lens_q": cuts,
            "cu_seq_lens_k": cuts,
            "max_length_q": tokens,
            "max_length_k": tokens,
        }
        self.balance.start_step(tokens)
        self.balance.start_micro_batch(torch.ones(tokens, dtype=torch.bool, device=META))
        rows = tokens * self.text.experts.num_experts_per_tok if self.text.experts is not None else 0
        with _meta(), Operations(rows=rows) as forward:
            y = self.layer(x, **given) if recompute == "none" else self._checkpoint(x, recompute, given)
        y = y[0] if isinstance(y, tuple) else y
        grad = torch.empty_like(y)
        with _meta(), Operations(rows=rows) as backward:
            y.backward(grad)
        return forward, backward

    def _checkpoint(self, x: torch.Tensor, recompute: Recompute, given: dict[str, Any]) -> Any:
        run = partial(self.layer, **given)
        if self.ours:
            return checkpointed(run, x, context_fn=contexts(recompute), draws=False)
        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def _meta() -> Iterator[None]:
    """Patch the parts that do not run, or are not counted, on meta.

    PEFT disables autocasting around an adapter of stacks, which torch refuses for this device. Balance hides its
    operations from modes, so that recompute does not see them; here they must be counted.
    """
    with patch("torch.autocast", lambda **_: nullcontext()), patch("moe.balance._disable_current_modes", nullcontext):
        yield


def _config(text: Text) -> Any:
    rope = {
        "rope_type": "default",
        "rope_theta": text.rope.theta,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
    names: tuple[str, ...] = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    )
    sizes = {name: getattr(text, name) for name in names} | {"num_hidden_layers": 1, "rope_parameters": rope}
    if text.experts is None:
        sizes["mlp_only_layers"] = [0]
    else:
        names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
        sizes |= {name: getattr(text.experts, name) for name in names}
    config = Qwen3VLMoeConfig(text_config=sizes).text_config
    config._attn_implementation, config._experts_implementation = "varlen", "grouped_mm"
    return config


def _block(config: Any, adapters: AdaptersConfig, resident: bool, balance: Balance) -> ExpertParallelMoe:
    family, router = adapters.experts, adapters.router
    lora = ExpertLora(r=family.r, alpha=family.alpha) if family.mode == "lora" else None
    options = LayerOptions(
        experts=family.mode, lora=lora, resident=resident, router=RouterOptions(mode=router.mode, r=router.r)
    )
    return ExpertParallelMoe(
        name="layer",
        index=0,
        config=config,
        ep_size=1,
        options=options,
        balance=balance,
        dtype=torch.bfloat16,
        device=META,
    )


def _adapt(layer: nn.Module, adapters: AdaptersConfig, stacks: list[str]) -> None:
    """Add PEFT's factors in the layer's dtype, as in an engine; factors of stacks get attention's rank."""
    targets = PROJECTIONS + DENSE * (adapters.mlp.mode == "lora")
    options = LoraConfig(r=adapters.attention.r, target_modules=targets, target_parameters=stacks)
    inject_adapter_in_model(options, layer)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
