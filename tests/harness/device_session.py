"""The separate process of the second device's tests: each case runs on the CPU, then on the device."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from base_folders import dense_model
from packed_rows import SPEC, row, token_groups
from sequence_session import adapted_model
from tiny_moe import start_factors, text_model, vl_model
from torch import Tensor

from benchmarks.device.second_device import DEVICE, SecondDevice, move_module
from finetune.model.divergence import compare_row
from finetune.model.forward import PackedModel
from finetune.model.recompute import set_recompute
from finetune.model.resident import make_resident
from finetune.model.tiled_norm import tile_norms
from finetune.model.varlen import register
from finetune.ranks.engine import start_distributed
from moe.balance import Balance
from moe.experts import ExpertLora
from moe.parallel import LayerOptions, replace_moe_blocks
from moe.router import RouterOptions

ROWS = {"text": ("", ""), "media": ("vi", "iw", ""), "blank": ()}
EXPERTS, LAYERS, TOP_K = 12, 2, 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, the trainable part of its tower ("nothing", "lora" or "all"), and its options."""

    kind: str = "moe"
    tower: str = "nothing"
    recompute: Any = "layer"
    attention: str = "varlen"
    balance: Any = "micro"
    dropout: float = 0.0
    tile: int = 0
    offload: bool = False

    @property
    def rows(self) -> list[str]:
        return [name for name in ROWS if self.kind != "text" or name != "media"]


@dataclass(kw_only=True)
class Outcome:
    """The losses of each row and the gradients of a step; `evaluated` belongs to the media row."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)
    evaluated: list[Tensor] = field(default_factory=list)
    counts: Any = None
    waits: dict[str, dict[str, int]] = field(default_factory=dict)
    convolutions: int = 0


def session(rank: int, world: int, cases: list[Case]) -> list[tuple[Outcome, Outcome]]:
    start_distributed()
    return [(_on_cpu(case), _on_device(case)) for case in cases]


def _on_cpu(case: Case) -> Outcome:
    packed, balance = _built(case, "segments" if case.attention == "varlen" else case.attention)
    return _step(case, packed, balance, torch.device("cpu"), dict)


def _on_device(case: Case) -> Outcome:
    packed, balance = _built(case, case.attention)
    with SecondDevice() as device:
        move_module(packed)
        if balance is not None:
            balance._device = DEVICE
        out = _step(case, packed, balance, DEVICE, partial(_emptied, device))
        out.convolutions = device.convolutions
        return out


def _emptied(device: SecondDevice) -> dict[str, int]:
    found = dict(device.waits)
    device.waits.clear()
    return found


def _built(case: Case, attention: str) -> tuple[PackedModel, Balance | None]:
    model = {"moe": adapted_model if case.tower == "lora" else vl_model, "dense": dense_model, "text": text_model}[
        case.kind
    ]()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("input_layernorm" in name or "lora" in name or (case.tower == "all" and "vis" in name))
    balance = None
    if case.kind != "dense":
        layers = model.config.get_text_config().num_hidden_layers
        balance = Balance(
            mode=case.balance,
            coefficient=0.1,
            z_coefficient=0.01,
            layers=layers,
            experts=EXPERTS,
            top_k=TOP_K,
            device=torch.device("cpu"),
        )
        options = LayerOptions(
            experts="lora",
            lora=ExpertLora(r=8, alpha=12, dropout=case.dropout),
            router=RouterOptions(mode="full"),
            resident=True,
            tiles=3 if case.tile else 1,
        )
        for layer in replace_moe_blocks(model, ep_size=1, options=options, balance=balance):
            start_factors(layer)
    make_resident(model)
    register()
    model.set_attn_implementation(attention)
    set_recompute(model, case.recompute, host_from_bytes=1024 if case.offload else None)
    if case.tile:
        tile_norms(model, case.tile)
    packed = PackedModel(model, spec=None if case.kind == "text" else SPEC)
    packed.host_from_bytes = 1024 if case.offload else None
    return packed.train(), balance


def _step(
    case: Case, packed: PackedModel, balance: Balance | None, device: torch.device, waited: Callable[[], dict[str, int]]
) -> Outcome:
    """Take a step on the case's rows like `finetune.training.update`, then run one row like an evaluation."""
    out, batches = Outcome(), {name: row(*ROWS[name]) for name in case.rows}
    torch.manual_seed(3)  # for dropout
    if balance is not None:
        tokens = sum(int((batch.sample_ids >= 0).sum()) for batch in batches.values())
        balance.start_step(tokens, groups=len(token_groups()))
    found = {}
    waited()
    for name, batch in batches.items():
        sent = packed.send(batch, device, token_groups()).arrived()
        if balance is not None:
            balance.start_micro_batch(sent.valid_T, sent.groups_DT)
        losses = found[name] = packed(batch=sent)
        losses.objective.backward()
        out.waits[name] = waited()
    out.losses = {name: [each.objective.item(), *each.ce_S.tolist()] for name, each in found.items()}
    out.grads = {n: p.grad.cpu() for n, p in packed.named_parameters() if p.grad is not None}
    if balance is not None:
        load = balance.finish_step()
        out.counts = (load.counts, load.groups)
    waited()
    evaluated = packed.eval()(batch=batches[case.rows[1]], measure=partial(compare_row, with_base=True))
    out.waits["evaluation"] = waited()
    out.evaluated = [part.cpu() for part in evaluated]
    return out


def rules(rank: int, world: int) -> dict[str, Any]:
    """Return what the device counts and refuses, one operation at a time."""
    here = torch.arange(6.0).view(2, 3)
    operations: dict[str, Callable[[Tensor], Any]] = {
        "item": lambda x: x[0, 0].item(),
        "tolist": lambda x: x.tolist(),
        "cpu": lambda x: x.cpu(),
        "bool": lambda x: bool(x[0, 0]),
        "nonzero": lambda x: x.nonzero(),
        "boolean index": lambda x: x[x > 2],
        "boolean store": lambda x: x.clone().index_put_((x > 2,), torch.zeros(3, device=DEVICE)),
        "blocking copy": lambda x: x.copy_(here),
        "copy of pageable memory": lambda x: here.to(DEVICE, non_blocking=True),
        "a list made a tensor": lambda x: torch.tensor([1, 2], device=DEVICE),
        "repeats": lambda x: torch.ones(2, device=DEVICE).repeat_interleave(torch.tensor([1, 2]).to(DEVICE)),
        "page-locked copy there": lambda x: _pinned(here).to(DEVICE, non_blocking=True),
        "page-locked copy back": lambda x: _pinned(here).copy_(x, non_blocking=True),
        "known repeats": lambda x: x.repeat_interleave(2, dim=0),
        "integer index": lambda x: x[x.argmax(0) * 0],
        "masked fill": lambda x: x.masked_fill(x > 2, 0),
        "a number": lambda x: x * 2.0 + torch.tensor(3.0),
        "mixed": lambda x: x + here,
        "mixed weights": lambda x: F.linear(x, here),
        "rows 12 bytes apart": lambda x: F.grouped_mm(
            x.new_zeros(4, 3), x.new_zeros(2, 3, 4), offs=_offsets(torch.int32)
        ),
        "long offsets": lambda x: F.grouped_mm(x.new_zeros(4, 4), x.new_zeros(2, 4, 4), offs=_offsets(torch.int64)),
        "shifted": lambda x: F.grouped_mm(
            x.new_zeros(17)[1:].view(4, 4), x.new_zeros(2, 4, 4), offs=_offsets(torch.int32)
        ),
        "grouped": lambda x: F.grouped_mm(x.new_zeros(4, 4), x.new_zeros(2, 4, 4), offs=_offsets(torch.int32)),
        "convolution": lambda x: F.conv1d(x[None], x.new_zeros(1, 2, 2)),
    }
    found: dict[str, Any] = {}
    with SecondDevice() as device:
        for name, operation in operations.items():
            there = here.to(DEVICE)
            device.waits.clear()
            try:
                operation(there)
            except RuntimeError as error:
                found[name] = str(error)
            else:
                found[name] = sum(device.waits.values())
        found["convolutions"] = device.convolutions
    return found


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, pin_memory=True).copy_(tensor)


def _offsets(dtype: torch.dtype) -> Tensor:
    return torch.arange(1, 3, dtype=dtype, device=DEVICE) * 2
