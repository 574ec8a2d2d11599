"""Count the collectives of a training step of a small Qwen3-VL-MoE on several gloo ranks: ours, or plain ZeRO-3."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness.collectives import CollectiveCounter, Kind
from benchmarks.harness.spawned import on_ranks

HIDDEN = 64
EXPERTS = 32
INTERMEDIATE = 96
TOP_K = 4
LAYERS = 3
ROWS = 8
LENGTH = 40


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One configuration; `plain` is the unchanged transformers model with every weight partitioned over all ranks."""

    side: Literal["ours", "plain"]
    resident: bool = False
    recompute: Literal["none", "layer", "selective"] = "none"
    micro_batches: int = 1


@dataclass(kw_only=True)
class Counted:
    """The counts of one rank: sizes in bytes, and collectives of one micro-batch (both passes) and of the update."""

    weights: int = 0
    experts: int = 0
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    micro_batch: dict[Kind, int] = field(default_factory=dict)
    step_gathers: int = 0
    """Bytes gathered in all micro-batches of one step, excluding the update."""
    update: dict[Kind, int] = field(default_factory=dict)


def count(setups: list[Setup], *, world: int) -> list[list[Counted]]:
    """Return the counts by setup and rank, taken after DeepSpeed has settled its order of fetches."""
    ranks = on_ranks(world, _train_all, setups, world)
    return [[rank[index] for rank in ranks] for index in range(len(setups))]


def _train_all(setups: list[Setup], world: int) -> list[Counted]:
    return [_train(setup, dist.get_rank(), world) for setup in setups]


def gathered(kinds: dict[Kind, int]) -> int:
    """Return the bytes of all all-gathers of floating-point data."""
    return sum(size for kind, size in kinds.items() if "allgather" in kind.collective and "float" in kind.dtype)


def by_kind(kinds: dict[Kind, int]) -> dict[str, int]:
    """Return the table with readable keys, for a record."""
    return {f"{kind.collective} of {kind.dtype} over {kind.ranks} ranks": size for kind, size in sorted(kinds.items())}


def _model() -> Any:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {
        "vocab_size": 176,
        "hidden_size": HIDDEN,
        "intermediate_size": 72,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "moe_intermediate_size": INTERMEDIATE,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 2,
        "hidden_size": 40,
        "num_heads": 2,
        "intermediate_size": 44,
        "patch_size": 4,
        "out_hidden_size": HIDDEN,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 64,
    }
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("input_layernorm" in name)
    return model


def _train(setup: Setup, rank: int, world: int) -> Counted:
    """Count the last of three steps: in the first two, DeepSpeed records its trace."""
    from finetune.model.recompute import set_recompute
    from finetune.model.resident import make_resident
    from finetune.ranks.engine import EngineOptions, backward, initialize, start_distributed
    from moe.experts import ExpertLora
    from moe.parallel import LayerOptions, replace_moe_blocks

    start_distributed()
    model = _model()
    counted = Counted(
        weights=sum(p.nbytes for p in model.parameters()),
        experts=sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name),
    )
    if setup.side == "ours":
        lora = ExpertLora(r=8, alpha=16)
        replace_moe_blocks(
            model, ep_size=world, options=LayerOptions(experts="lora", lora=lora, resident=setup.resident)
        )
        if setup.resident:
            make_resident(model)
    # as in a large model, no weight is too small to partition, and none stays gathered from forward to backward
    options = EngineOptions(
        dtype="float32",
        micro_batches_per_step=setup.micro_batches,
        persistence_threshold=1_000_000 if setup.resident else 0,
        lr=0.0,
        prefetch_elements=0,
        extra={"zero_optimization": {"stage3_max_reuse_distance": 0}},
    )
    engine = initialize(model, options)
    set_recompute(model, setup.recompute)
    model.train()
    ids = torch.randint(0, 160, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)).chunk(world)[rank]
    for _ in range(3):
        counted.step_gathers = 0
        for _ in range(setup.micro_batches):
            with CollectiveCounter() as micro_batch:
                logits = engine(input_ids=ids, use_cache=False).logits
                backward(engine, logits.square().sum(), ROWS * LENGTH)
            counted.step_gathers += gathered(dict(micro_batch.bytes))
            with CollectiveCounter() as update:
                engine.step()
    counted.logits = logits.detach()
    counted.micro_batch, counted.update = dict(micro_batch.bytes), dict(update.bytes)
    engine.destroy()
    return counted
