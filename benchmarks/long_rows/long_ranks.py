"""Measure forward and backward of a small MoE on one long row, shared by ranks: memory, traffic and seconds."""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.harness.collectives import CollectiveCounter
from benchmarks.harness.memory import Allocations
from benchmarks.harness.rows import text_row
from benchmarks.harness.spawned import on_ranks
from data.stream.batch import Batch

VOCAB = 96
LAYERS = 3
HIDDEN = 128
HEADS = 8
KV_HEADS = 4
HEAD_DIM = 16
EXPERTS = 8
TOP_K = 2
INTERMEDIATE = 64


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A row of `tokens` tokens over `sp` ranks, with its memory-saving options."""

    tokens: int
    sp: int
    recompute: Literal["none", "layer", "selective"] = "layer"
    tiles: int = 1
    offload: bool = False


@dataclass(kw_only=True)
class RankResult:
    """The measurements of one rank; gradients are its share, and the group's shares add up to the full ones."""

    peak: int
    exchanged: int
    """Bytes passed to the all-to-alls of attention, forward and backward."""
    seconds: float
    loss: float
    grads: dict[str, Tensor] = field(default_factory=dict)


def measure(setups: list[Setup], *, world: int) -> list[list[RankResult]]:
    """Return the results by setup and rank."""
    ranks = on_ranks(world, run_setups, setups)
    return [[rank[index] for rank in ranks] for index in range(len(setups))]


def together(ranks: list[RankResult]) -> dict[str, Tensor]:
    """Return loss and gradients of the row: the sums over the ranks that share it."""
    grads = {name: torch.stack([rank.grads[name] for rank in ranks]).sum(0) for name in ranks[0].grads}
    return grads | {"loss": torch.tensor([sum(rank.loss for rank in ranks)])}


def run_setups(setups: list[Setup]) -> list[RankResult]:
    """Run the setups on this rank, whose process group is up; every rank must call this with the same setups."""
    from finetune.model.sequence import sequence_group
    from finetune.ranks.engine import start_distributed

    start_distributed()
    groups = {sp: sequence_group(sp) for sp in sorted({setup.sp for setup in setups})}
    return [_run(setup, groups[setup.sp]) for setup in setups]


def _run(setup: Setup, group: Any) -> RankResult:
    from finetune.model.forward import PackedModel
    from finetune.model.recompute import set_recompute
    from finetune.model.sequence_attention import use_sequence
    from finetune.model.tiled_norm import tile_norms
    from finetune.training.setup import share_rows

    model = _model(setup.tiles)
    use_sequence(model, [setup.sp], "segments")
    packed = PackedModel(model, spec=None)
    share_rows(packed, None, group)
    packed.host_from_bytes = 1 if setup.offload else None
    if setup.tiles > 1:
        tile_norms(model, -(-setup.tokens // setup.sp // setup.tiles))
    set_recompute(model, setup.recompute, host_from_bytes=packed.host_from_bytes)
    packed.train()
    batch = _row(setup.tokens)
    packed(batch=batch).objective.backward()  # warm-up: libraries allocate their own memory
    model.zero_grad()
    with Allocations() as made:
        packed(batch=batch).objective.backward()
    model.zero_grad()
    with CollectiveCounter() as moved:
        packed(batch=batch).objective.backward()
    model.zero_grad()
    began = time.perf_counter()
    loss = packed(batch=batch).objective
    loss.backward()
    seconds = time.perf_counter() - began
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    exchanged = moved.total("all_to_all_single")
    return RankResult(peak=made.peak_bytes, exchanged=exchanged, seconds=seconds, loss=loss.item(), grads=grads)


def _model(tiles: int) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moe.experts import ExpertLora
    from moe.parallel import LayerOptions, replace_moe_blocks

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=72,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_experts=EXPERTS,
        moe_intermediate_size=INTERMEDIATE,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=1 << 20,
    )
    model = Qwen3MoeForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layernorm" in name)
    options = LayerOptions(experts="lora", lora=ExpertLora(r=4, alpha=8), tiles=tiles)
    for layer in replace_moe_blocks(model, ep_size=1, options=options):
        layer.experts.init_lora(b_std=0.05)
    return model


def _row(tokens: int) -> Batch:
    """Two samples, of a third and two thirds of the row, without padding."""
    lengths = [tokens // 3, tokens - tokens // 3]
    ids = torch.randint(0, VOCAB, (tokens,), generator=torch.Generator().manual_seed(1))
    return text_row(torch.split(ids, lengths), [torch.ones(length) for length in lengths])
