"""One forward and backward of a small MoE over one long row, on ranks that share it: memory, bytes moved, seconds."""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.harness.collectives import CollectiveCounter
from benchmarks.harness.memory import Allocations
from benchmarks.harness.spawned import on_ranks
from data.stream.batch import Batch

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 128, 8, 4, 16, 3, 96
EXPERTS, TOP_K, INTERMEDIATE = 8, 2, 64


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is run: a row of so many tokens over `sp` ranks, with what saves memory."""

    tokens: int
    sp: int
    recompute: Literal["none", "layer", "selective"] = "layer"
    tiles: int = 1
    offload: bool = False


@dataclass(kw_only=True)
class Found:
    """What one rank saw; gradients are this rank's share, to be added up over the group."""

    peak: int
    exchanged: int
    """Bytes handed to the all-to-alls of attention, forward and backward."""
    seconds: float
    loss: float
    grads: dict[str, Tensor] = field(default_factory=dict)


def measure(setups: list[Setup], *, world: int) -> list[list[Found]]:
    """Return, per setup and rank, what was found."""
    ranks = on_ranks(world, run_setups, setups)
    return [[rank[index] for rank in ranks] for index in range(len(setups))]


def together(ranks: list[Found]) -> dict[str, Tensor]:
    """Loss and gradients of the row: the sums over the ranks that share it."""
    grads = {name: torch.stack([rank.grads[name] for rank in ranks]).sum(0) for name in ranks[0].grads}
    return grads | {"loss": torch.tensor([sum(rank.loss for rank in ranks)])}


def run_setups(setups: list[Setup]) -> list[Found]:
    """Run them on this rank, whose process group is up; every rank must call this with the same ones."""
    from finetune.model.sequence import sequence_group
    from finetune.ranks.engine import start_distributed

    start_distributed()
    groups = {sp: sequence_group(sp) for sp in sorted({setup.sp for setup in setups})}
    return [_run(setup, groups[setup.sp]) for setup in setups]


def _run(setup: Setup, group: Any) -> Found:
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
    packed(batch=batch).objective.backward()  # the first time libraries allocate for themselves
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
    return Found(peak=made.peak_bytes, exchanged=exchanged, seconds=seconds, loss=loss.item(), grads=grads)


def _model(tiles: int) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moe.experts import ExpertLora
    from moe.parallel import LayerOptions, replace_moe_blocks

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=72, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, num_experts=EXPERTS,
        moe_intermediate_size=INTERMEDIATE, num_experts_per_tok=TOP_K, norm_topk_prob=True, tie_word_embeddings=False,
        max_position_embeddings=1 << 20,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layernorm" in name)
    options = LayerOptions(experts="lora", lora=ExpertLora(r=4, alpha=8), tiles=tiles)
    for layer in replace_moe_blocks(model, ep_size=1, options=options):
        layer.experts.init_lora(b_std=0.05)
    return model


def _row(tokens: int) -> Batch:
    """Two samples, of a third and two thirds of the row, without padding."""
    cut = tokens // 3
    generator = torch.Generator().manual_seed(1)
    weights = torch.ones(1, tokens)
    weights[0, 0] = weights[0, cut] = 0
    positions = torch.cat([torch.arange(cut), torch.arange(tokens - cut)]).expand(4, 1, -1)
    empty, grids = torch.zeros(0, 1, dtype=torch.uint8), torch.zeros(0, 3, dtype=torch.int64)
    return Batch(
        input_ids=torch.randint(0, VOCAB, (1, tokens), generator=generator), loss_weights=weights,
        positions=positions.contiguous(), sample_ids=(torch.arange(tokens) >= cut).int()[None],
        cu_seq_lens=torch.tensor([0, cut, tokens], dtype=torch.int32), max_length=tokens - cut, image_patches=empty,
        image_grids=grids, video_patches=empty, video_grids=grids, keys=("s/0", "s/1"),
    )  # fmt: skip
