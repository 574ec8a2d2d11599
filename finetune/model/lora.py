"""LoRA on the model: which parts are adapted and how, PEFT's layers and config for them, and the table of parts.

`adapters_off` gives the output of the base from a model that is being tuned. Parts that train in full keep no copy of
their base values and stay as they are, except a router, which keeps one for its agreement statistic.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from finetune.architecture.parts import NO_LORA, PARTS
from finetune.architecture.shapes import Shape, part_of
from finetune.config import AdaptersConfig
from moe.experts import ExpertLora as Lora
from moe.experts import GroupedExperts
from moe.names import PEFT_PREFIX
from moe.router import Router
from moe.start_values import generator_of, uniform_factor


@contextmanager
def adapters_off(module: nn.Module, parts: Collection[str] | None = None) -> Iterator[None]:
    """Leave the adapters out inside the block, or only those on some parts of the model.

    Every rank must enter it, because fewer weights are gathered there.
    """
    dense = [
        layer
        for name, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer) and (parts is None or part_of(f"{name}.weight") in parts)
    ]
    sparse = [
        layer
        for layer in module.modules()
        if (isinstance(layer, GroupedExperts) and (parts is None or "experts" in parts))
        or (isinstance(layer, Router) and (parts is None or "router" in parts))
    ]
    before = [layer._disable_adapters for layer in dense], [layer.is_adapted for layer in sparse]
    try:
        for layer in dense:
            layer._disable_adapters = True  # PEFT's own switch would also stop the factors from training
        for layer in sparse:
            layer.is_adapted = False
        yield
    finally:
        for layer, off in zip(dense, before[0], strict=True):
            layer._disable_adapters = off
        for layer, on in zip(sparse, before[1], strict=True):
            layer.is_adapted = on


if TYPE_CHECKING:
    from finetune.model.empty import EmptyModel, ModelOptions

ADAPTER = "default"
"""PEFT's name for the adapter that trains."""


@dataclass(frozen=True, kw_only=True)
class PartRow:
    """One part: how it trains, how many tensors of the base that covers, and its parameters over all ranks."""

    part: str
    mode: str
    tensors: int
    trained: int
    total: int
    lora: Lora | None


def with_adapters(config: AdaptersConfig, options: "ModelOptions") -> "ModelOptions":
    """Return the options with the adapters and trained parts of the configuration; the rest stays as it is."""
    sections = {part: getattr(config, part) for part in PARTS}
    lora = {
        part: _lora(section) for part, section in sections.items() if section.mode == "lora" and hasattr(section, "r")
    }
    refuse = [part for part, section in sections.items() if section.mode == "lora" and part not in lora]
    for part in refuse:
        raise ValueError(f"adapters.{part}.mode: lora: {NO_LORA[part]}. Use frozen or full")
    experts, router = lora.pop("experts", None), lora.pop("router", None)
    sparse = {"mode": sections["router"].mode} | ({"r": router.r, "alpha": router.alpha} if router else {})
    layer = replace(
        options.layer,
        experts=sections["experts"].mode,
        lora=experts,
        router=replace(options.layer.router, **sparse),
    )
    full = [part for part, section in sections.items() if section.mode == "full" and part not in ("experts", "router")]
    return replace(options, layer=layer, train=tuple(full), lora=lora)


def _lora(section: Any) -> Lora:
    return Lora(**{key: value for key, value in asdict(section).items() if key not in ("mode", "lr")})


def lora_targets(expected: Iterable[tuple[str, Shape]], part: str) -> list[str]:
    """Return the full paths of a part's matrices, given canonical names and shapes."""
    return [
        name.removesuffix(".weight")
        for name, shape in expected
        if part_of(name) == part and len(shape) == 2 and name.endswith(".weight")
    ]


def inject(module: nn.Module, expected: Mapping[str, Shape], lora: Mapping[str, Lora]) -> None:
    """Put PEFT's LoRA layers around the matrices of these parts, on meta; call it before sparse blocks are replaced.

    The factors have the dtype of the weights they adapt, like all parameters of the engine; their masters are float32.
    """
    targets: dict[str, list[str]] = {}
    for part in lora:
        if part in NO_LORA:
            raise ValueError(f"LoRA on {part}: {NO_LORA[part]}. Freeze it or train it in full")
        targets[part] = lora_targets(expected.items(), part)
        if not targets[part]:
            raise ValueError(f"LoRA on {part}: the model has no matrices of this part. Leave adapters.{part} frozen")
    if not targets:
        return
    inject_adapter_in_model(peft_config(targets, lora), module, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    wrapped = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLinear)}
    assert set(wrapped) == {name for names in targets.values() for name in names}
    for part, names in targets.items():
        for name in names:
            _finish(wrapped[name], lora[part])


def _finish(layer: Any, lora: Lora) -> None:
    """Give a layer its part's dropout, because PEFT's config has only one for all, and its weight's dtype."""
    assert layer.scaling[ADAPTER] == lora.scale
    assert layer.r[ADAPTER] == lora.r
    layer.lora_dropout[ADAPTER] = nn.Dropout(lora.dropout) if lora.dropout else nn.Identity()
    for factor in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
        empty = torch.empty(factor.weight.shape, dtype=layer.base_layer.weight.dtype, device="meta")
        factor.weight = nn.Parameter(empty)


def peft_config(
    targets: Mapping[str, list[str]], lora: Mapping[str, Lora], *, parameters: Mapping[str, list[str]] | None = None
) -> LoraConfig:
    """Return PEFT's own config of adapters on modules and, for a file, on bare parameters.

    Each part has its rank and scale. Those of the first part with bare parameters are the defaults, because PEFT warns
    of any pattern for these; the others are patterns over full paths. rsLoRA and dropout are left out: PEFT has one
    switch of each for all adapters, and does not allow dropout with adapters on parameters.
    """
    parameters = parameters or {}
    first = lora[next(iter(parameters or targets))]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    groups = {**parameters, **targets}
    for part, names in groups.items():
        if lora[part].r == first.r and _peft_alpha(lora[part]) == _peft_alpha(first):
            continue
        meant = _pattern_of(names, [name for other, others in groups.items() if other != part for name in others])
        if lora[part].r != first.r:
            ranks[meant] = lora[part].r
        if _peft_alpha(lora[part]) != _peft_alpha(first):
            alphas[meant] = _peft_alpha(lora[part])
    return LoraConfig(
        r=first.r,
        lora_alpha=_peft_alpha(first),
        target_modules=[name for names in targets.values() for name in names],
        target_parameters=[name for names in parameters.values() for name in names] or None,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        lora_dropout=0.0,
        use_rslora=False,
    )


def _peft_alpha(lora: Lora) -> float:
    """Return the alpha for which alpha / r is the scale."""
    return lora.alpha if not lora.rslora else lora.scale * lora.r


def _pattern_of(names: list[str], others: Iterable[str]) -> str:
    """Return a pattern of these full paths and no others; it lists each path if only numbers tell them apart."""
    short = pattern(names)
    expression = re.compile(rf"(.*\.)?({short})$")
    return "|".join(map(re.escape, names)) if any(expression.match(other) for other in others) else short


def pattern(names: Iterable[str]) -> str:
    """Return one regular expression for full paths that differ in their layers' numbers."""
    return "|".join(dict.fromkeys(re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in names))


def initial_factor(canonical: str, shape: Shape, *, seed: int) -> Tensor:
    """Return the float32 start value of a dense factor, equal on every rank: A uniform in +-1/sqrt(in), B zero."""
    if ".lora_B" in canonical:
        return torch.zeros(shape)
    return uniform_factor(shape, generator_of(seed, canonical.removeprefix(PEFT_PREFIX)))


def adapted_part(canonical: str) -> str:
    """Return the part that a canonical name belongs to, whether of a base tensor or of an adapter's."""
    match = re.match(r"(.*?)(?:\.base_layer)?\.lora_[AB]\.weight$", canonical.removeprefix(PEFT_PREFIX))
    return part_of(f"{match[1]}.weight" if match else canonical.removeprefix(PEFT_PREFIX))


def trainable_table(empty: "EmptyModel") -> list[PartRow]:
    """Return a row for each part that the model has, in the order of `adapters:`; the same rows with any sharding."""
    total: Counter[str] = Counter()
    for name, shape in empty.expected.items():
        total[part_of(name)] += math.prod(shape)
    trained: Counter[str] = Counter()
    tensors: dict[str, set[str]] = {part: set() for part in total}
    for name, parameter in empty.module.named_parameters():
        if not parameter.requires_grad:
            continue
        canonical = empty.canonical(name)
        part = adapted_part(canonical)
        trained[part] += parameter_count(empty.module, name, parameter)
        tensors[part].add(re.sub(r"\.lora_[AB]\.weight$", "", canonical))
    lora = {**empty.lora, **sparse_lora(empty.module)}
    rows = []
    for part in PARTS:
        if part not in total:
            continue
        mode = "frozen" if not trained[part] else "lora" if part in lora else "full"
        rows.append(
            PartRow(
                part=part,
                mode=mode,
                tensors=len(tensors[part]),
                trained=trained[part],
                total=total[part],
                lora=lora.get(part),
            )
        )
    return rows


def table_lines(rows: Iterable[PartRow]) -> list[str]:
    """Return the lines of the table that is printed at start."""
    lines = [f"{'family':<18}{'mode':<8}{'tensors':>8}{'trained':>16}{'of':>18}"]
    for row in rows:
        note = f"  r {row.lora.r}, scale {row.lora.scale:g}" if row.lora else ""
        lines.append(f"{row.part:<18}{row.mode:<8}{row.tensors:>8}{row.trained:>16,}{row.total:>18,}{note}")
    return lines


def parameter_count(module: nn.Module, name: str, parameter: nn.Parameter) -> int:
    """Return the elements of a parameter over all ranks: all slices that ZeRO made, and every expert of a stack."""
    count: int = getattr(parameter, "ds_numel", parameter.numel())
    owner = module.get_submodule(name.rpartition(".")[0])
    return count * owner.num_experts // len(owner.local_experts) if isinstance(owner, GroupedExperts) else count


def sparse_lora(module: nn.Module) -> dict[str, Lora]:
    """Return the LoRA options of experts and routers, read from the layers themselves."""
    by_part: dict[str, Lora] = {}
    for layer in module.modules():
        if isinstance(layer, GroupedExperts) and layer.lora is not None:
            by_part["experts"] = Lora(**asdict(layer.lora))
        elif isinstance(layer, Router) and layer.options.mode == "lora":
            by_part["router"] = Lora(r=layer.options.r, alpha=layer.options.alpha)
    return by_part
