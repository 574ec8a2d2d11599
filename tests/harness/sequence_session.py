"""One rank of the sequence-parallel tests: steps on packed rows, with their losses, gradients and load."""

from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from packed_rows import SPEC, WIDTHS, sample, token_groups
from peft.tuners.lora import Linear as LoraLinear
from tiny_moe import LORA, start_factors, vl_model
from torch import Tensor, nn

from data.stream.batch import Batch, LossSums, Step, collate, loss_sums
from finetune.model.forward import PackedModel
from finetune.model.lora import ADAPTER, inject
from finetune.model.loss import Normalise, normaliser, step_loss, step_sums
from finetune.model.recompute import set_recompute
from finetune.model.resident import make_resident
from finetune.model.sequence import counted_once, sequence_group
from finetune.model.sequence_attention import use_sequence
from finetune.model.tiled_norm import tile_norms
from finetune.model.varlen import register
from finetune.ranks.collectives import sum_over_ranks
from finetune.ranks.engine import EngineOptions, backward, initialize, require_step_applied, start_distributed
from finetune.training.setup import share_rows
from moe.balance import Balance
from moe.config import BalanceMode
from moe.parallel import LayerOptions, replace_moe_blocks
from moe.router import RouterOptions

ADAPTED = ("attention", "vision_blocks", "merger", "deepstack_mergers")
PACKS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("", "i", "v"), ("iv", "")),
    (("", "", ""), ("w", "j", "i", "vi")),
    ((), ("v", "w")),
)
"""Media of the samples by [step][pack]: mixed media, a row of text alone next to one of media, and a dummy."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Three steps of two packs, and their distribution over the ranks."""

    sp: int = 1
    ep: int = 1
    backend: str = "segments"
    recompute: str = "none"
    resident: bool = True
    how: Normalise = "token"
    balance: BalanceMode = "global"
    length: int = 9
    """Length of the text after a sample's media; it decides whether rows are divisible by sp."""
    tile: int = 0
    """Tokens per tile of the norms; the experts then use three tiles."""
    offload: bool = False


@dataclass(kw_only=True)
class Outcome:
    losses: list[float] = field(default_factory=list)
    balance: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    counts: list[Any] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)
    grads: list[dict[str, Tensor]] = field(default_factory=list)
    ce: list[float] = field(default_factory=list)
    tower_calls: int = 0
    tower_patches: int = 0


def pack(*mixes: str, length: int = 9) -> Batch:
    """Return a packed row without padding, whose length may not be divisible."""
    samples = [sample(mix, length=length + number) for number, mix in enumerate(mixes)]
    return collate(samples, keys=[f"s/{mix or 'text'}" for mix in mixes], pad_id=0, multiple=1, widths=WIDTHS)


def adapted_model() -> Any:
    """Return the small model with LoRA on attention and tower; B is not zero, so that no gradients vanish."""
    model = vl_model()
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    inject(model, expected, dict.fromkeys(ADAPTED, LORA))
    generator = torch.Generator().manual_seed(11)
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            for factors, scale in ((layer.lora_A, 0.3), (layer.lora_B, 0.05)):
                values = torch.randn(factors[ADAPTER].weight.shape, generator=generator) * scale
                factors[ADAPTER].weight = nn.Parameter(values)
    return model


def session(rank: int, world: int, cases: list[Case]) -> list[Outcome]:
    """Run each case on this rank, with one engine at a time."""
    start_distributed()
    return [run(rank, world, case) for case in cases]


def run(rank: int, world: int, case: Case) -> Outcome:
    group = sequence_group(case.sp)
    model = adapted_model()
    text = model.config.text_config
    balance = Balance(
        mode=case.balance,
        coefficient=0.1,
        z_coefficient=0.01,
        layers=text.num_hidden_layers,
        experts=text.num_experts,
        top_k=text.num_experts_per_tok,
        device=torch.device("cpu"),
    )
    options = LayerOptions(
        experts="lora",
        lora=LORA,
        router=RouterOptions(mode="full"),
        resident=case.resident,
        seed=3,
        tiles=3 if case.tile else 1,
    )
    for layer in replace_moe_blocks(model, ep_size=case.ep, options=options, balance=balance):
        start_factors(layer)
    if case.resident:
        make_resident(model)
    register()
    model.set_attn_implementation(case.backend)
    if group is not None:
        use_sequence(model, [group.size], case.backend)
    packed = PackedModel(model, spec=SPEC, normalise=case.how)
    share_rows(packed, balance, group)
    if case.tile:
        assert tile_norms(model, case.tile) == 2 * text.num_hidden_layers + 1
    if case.offload:
        packed.host_from_bytes = 1
    data_size, data_rank = world // case.sp, rank // case.sp
    micro = 2 // data_size
    engine_options = EngineOptions(
        micro_batches_per_step=micro,
        dtype="float32",
        lr=1e-3,
        eps=1e-4,
        clip_norm=1e9,
        persistence_threshold=1_000_000 if case.resident else 0,
    )
    engine = initialize(packed, engine_options)
    set_recompute(model, case.recompute, host_from_bytes=packed.host_from_bytes)
    packed.train()
    out = Outcome()

    def seen(_: Any, args: Any) -> None:
        out.tower_calls, out.tower_patches = out.tower_calls + 1, out.tower_patches + len(args[0])

    model.model.visual.register_forward_pre_hook(seen)
    for number, mixes in enumerate(PACKS):
        rows = [pack(*mixes[data_rank * micro + m], length=case.length) for m in range(micro)]
        _step(engine, packed, balance, rows, case, number, out)
    engine.destroy()
    return out


def _step(
    engine: Any, packed: PackedModel, balance: Balance, rows: list[Batch], case: Case, number: int, out: Outcome
) -> None:
    cpu, group = torch.device("cpu"), packed.sequence
    step = Step(
        epoch=0,
        step=number,
        batches=tuple(rows),
        sums=sum((loss_sums(batch) for batch in rows), LossSums()),
        bad=(),
        notes=(),
        tokens=sum(int((batch.sample_ids >= 0).sum()) for batch in rows),
        images=0,
        video_seconds=0.0,
        wait_seconds=0.0,
    )
    step = counted_once(step, group)
    total = normaliser(step_sums(step.sums, cpu), case.how)
    groups = token_groups()
    balance.start_step(int(sum_over_ranks([step.tokens], cpu)[0]), groups=len(groups))
    losses = []
    for batch in rows:
        if losses:
            engine.step()
        sent = packed.send(batch, cpu, groups).arrived()
        balance.start_micro_batch(sent.valid_T, sent.groups_DT)
        losses.append(engine(batch=sent))
        backward(engine, losses[-1].objective, total)
    trained = {n: p for n, p in packed.named_parameters() if p.requires_grad}
    out.grads.append({n: safe_get_full_grad(p).float().clone() for n, p in trained.items()})
    engine.step()
    require_step_applied(engine, number)
    load = balance.finish_step()
    out.losses.append(step_loss(losses, total)[0])
    out.balance.append(load.loss_balance)
    out.counts.append(load.counts)
    out.groups.append(load.groups)
    out.norms.append(float(engine.get_global_grad_norm()))
    if engine.world_size == case.sp:  # every rank has a part of the same row
        for each in losses:
            sums = sum_over_ranks([*each.ce_S.tolist(), *each.weights_S.tolist()], cpu)
            out.ce += [ce / n for ce, n in zip(sums, sums[len(sums) // 2 :], strict=False)]
