"""Turn the pairs (A, B) of an adapter file into changes of base tensors; refuse ambiguous or misfitting files.

PEFT before 0.19.1 mistook transformers 5's [E, out, in] for [E, in, out], so its A and B are swapped and transposed.
The metadata decides which orientation a file has, or else the shapes do. If neither does, the file is refused: a wrong
guess would give a change of the right size but without meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.adapters.change import Change, Form
from finetune.adapters.keys import (
    CONFIG,
    ORIENTATION_KEY,
    Key,
    only_stack,
    packed_stack,
    rank_and_scale,
    turns_parameters,
)
from finetune.architecture.shapes import EMBEDDING, HEAD, Shape, is_expert_stack, other_stack
from finetune.files.tensorfile import FLOAT_TYPES, Stored, read_tensor

Pair = tuple[Stored, Stored]
"""The stored A and B of one change, or of one projection of one expert."""


@dataclass(frozen=True, kw_only=True)
class FileContext:
    """The facts that decide how to read a file's pairs: its config, its metadata and, if known, the base's shapes."""

    folder: Path
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    shapes: Mapping[str, Shape] | None


def changes_of(context: FileContext, pairs: Mapping[Key, Pair]) -> dict[str, Change]:
    """Return the changes, keyed by the base tensor to which each is added."""
    changes: dict[str, Change] = {}
    packed: dict[str, Pair] = {}
    singles: dict[str, dict[tuple[int, str], tuple[Key, Pair]]] = {}
    inner = {key.module.removesuffix(".base_layer") for key in pairs if key.is_inner}
    for key, pair in pairs.items():
        if key.projection is not None:
            stack = f"{key.stem}.{'down_proj' if key.projection == 'down' else 'gate_up_proj'}"
            singles.setdefault(stack, {})[key.expert, key.projection] = (key, pair)
        elif key.is_inner:
            packed[packed_stack(key.module)] = pair
        elif key.is_outer:
            packed[packed_stack(key.module) if key.module in inner else _only_stack(context, key.module)] = pair
        else:
            target = f"{key.module}.weight"
            changes[target] = _dense(context, target, pair)
    twice = sorted(packed.keys() & singles.keys())
    if twice:
        raise ValueError(f"{context.folder}: {twice[0]} is changed twice, in two forms")
    turned = _are_turned(context, packed)
    changes |= {name: _packed(context, name, pair, turned) for name, pair in packed.items()}
    return changes | {name: _single(context, name, pairs_of_stack) for name, pairs_of_stack in singles.items()}


def check_full(context: FileContext, name: str, tensor: Stored) -> None:
    """Raise unless a full tensor has a base tensor's name and shape; expert stacks need a known orientation."""
    shape = tuple(tensor.shape)
    _check_fits(context, name, shape, tensor)
    if name == EMBEDDING and context.shapes is not None and HEAD not in context.shapes:
        raise ValueError(
            f"{context.folder} replaces {name} alone, but this base ties its head to it: PEFT left the head unchanged, "
            f"and one tensor cannot be both. Merge it with PEFT, which writes a separate head"
        )
    if is_expert_stack(name) and shape[1] == shape[2] and ORIENTATION_KEY not in context.metadata:
        raise ValueError(
            f"{context.folder}: {name} {list(shape)} has the same shape transposed, and no metadata says which it is"
        )


def _only_stack(context: FileContext, module: str) -> str:
    """The only adapted stack of a layer; its factors have the names that down_proj's have when there are two."""
    stack = only_stack(context.config)
    if stack is None:
        raise ValueError(
            f"{context.folder}: {module} has factors of one stack only, and target_parameters in {CONFIG} does not say "
            f"whether they belong to gate_up_proj or down_proj"
        )
    return f"{module}.{stack}"


def _dense(context: FileContext, target: str, pair: Pair) -> Change:
    a, b = pair
    module = target.removesuffix(".weight")
    # PEFT treats the router as a parameter
    r, scale = rank_and_scale(context.config, target if module.endswith(".mlp.gate") else module)
    _check_rank(context, target, a.shape[0], r)
    shape = (b.shape[0], a.shape[1])
    _check_fits(context, target, shape, a)
    return Change(target=target, shape=shape, r=r, scale=scale, form="dense", parts=(pair,))


def _packed(context: FileContext, target: str, pair: Pair, turned: bool) -> Change:
    a, b = pair
    r, scale = rank_and_scale(context.config, target)
    experts, rest = divmod(a.shape[0], r)
    if context.shapes is not None and target in context.shapes:
        experts = context.shapes[target][0]
        rest = a.shape[0] - r * experts
    if rest or not experts:
        raise ValueError(
            f"{context.folder}: {target} has {a.shape[0]} rows in lora_A; with r {r} from {CONFIG} that is not "
            f"{'a whole number of' if context.shapes is None else experts} experts"
        )
    out, into = (a.shape[1], b.shape[0]) if turned else (b.shape[0], a.shape[1])
    _check_fits(context, target, (experts, out, into), a)
    form: Form = "packed, turned" if turned else "packed"
    return Change(target=target, shape=(experts, out, into), r=r, scale=scale, form=form, parts=(pair,))


def _are_turned(context: FileContext, packed: Mapping[str, Pair]) -> bool:
    """Return whether A and B of experts are swapped, as PEFT before 0.19.1 did; a file must not mix both kinds."""
    if ORIENTATION_KEY in context.metadata or not packed:
        return False
    straight, turned = "", ""
    for name in packed:
        fits_straight, fits_turned = _orientations(context, name, packed)
        if fits_straight and not fits_turned:
            straight = straight or name
        elif fits_turned and not fits_straight:
            turned = turned or name
    if straight and turned:
        raise ValueError(
            f"{context.folder} mixes two orientations: {straight} is [out, in] as PEFT 0.19.1 and newer write it, "
            f"{turned} is transposed as older versions write it. The file was assembled from two sources"
        )
    if straight or turned:
        return bool(turned)
    name, (a, b) = next(iter(packed.items()))
    if not any(_orientations(context, name, packed)):
        return False  # fits in neither orientation: the comparison with the base reports it
    if turns_parameters(context.config):
        return False
    raise ValueError(
        f"{context.folder}: {name} has factors {list(a.shape)} and {list(b.shape)}, which fit this base both as PEFT "
        f"0.19.1 and newer write them and transposed, as older versions do; nothing in the file says which. Save it "
        f"again with PEFT 0.19.1 or newer, or merge it with the version of PEFT that wrote it"
    )


def _orientations(context: FileContext, name: str, packed: Mapping[str, Pair]) -> tuple[bool, bool]:
    """Return whether (out, in) of a stack fit as stored, and transposed; the base or the other stack decides."""
    out_in = _out_in(packed[name])
    if context.shapes is not None:
        _, out, into = context.shapes.get(name, (0, 0, 0))
        return out_in == (out, into), out_in == (into, out)
    if other_stack(name) not in packed:
        return True, True
    gate_up, down = out_in, _out_in(packed[other_stack(name)])
    if name.endswith("down_proj"):
        gate_up, down = down, gate_up
    straight = gate_up[1] == down[0] and gate_up[0] == 2 * down[1]
    return straight, gate_up[0] == down[1] and gate_up[1] == 2 * down[0]


def _out_in(pair: Pair) -> tuple[int, int]:
    a, b = pair
    return b.shape[0], a.shape[1]


def _single(context: FileContext, target: str, parts: Mapping[tuple[int, str], tuple[Key, Pair]]) -> Change:
    """Assemble a stack from separate keys for each expert; `parts` is keyed by expert and projection."""
    projections = ("down",) if target.endswith("down_proj") else ("gate", "up")
    experts = max(expert for expert, _ in parts) + 1
    if context.shapes is not None and target in context.shapes:
        experts = context.shapes[target][0]
    places = [(expert, projection) for expert in range(experts) for projection in projections]
    missing = [f"{expert}.{projection}" for expert, projection in places if (expert, projection) not in parts]
    if missing or len(parts) != len(places):
        more = sorted(f"{expert}.{projection}" for expert, projection in parts if expert >= experts)
        raise ValueError(
            f"{context.folder}: {target} must have factors of {experts} experts; "
            + (f"missing: {', '.join(missing[:6])}" if missing else f"too many: {', '.join(more[:6])}")
        )
    scale = _common_scale(context, target, [parts[place] for place in places])
    pairs = tuple(parts[place][1] for place in places)
    halves = len(projections)
    shares_a = halves == 2 and all(_equal(pairs[at][0], pairs[at + 1][0]) for at in range(0, len(pairs), 2))
    ranks = [sum(a.shape[0] for a, _ in pairs[at : at + halves]) for at in range(0, len(pairs), halves)]
    shape = (experts, sum(b.shape[0] for _, b in pairs[:halves]), pairs[0][0].shape[1])
    if any((a.shape[1], b.shape[0] * halves) != (shape[2], shape[1]) for a, b in pairs):
        raise ValueError(
            f"{context.folder}: experts of {target} differ in their dimensions; the file mixes several models"
        )
    _check_fits(context, target, shape, pairs[0][0])
    r = max(ranks) // (2 if shares_a else 1)
    return Change(target=target, shape=shape, r=r, scale=scale, form="single", parts=pairs, shares_a=shares_a)


def _common_scale(context: FileContext, target: str, parts: Sequence[tuple[Key, Pair]]) -> float:
    """Return the common scale of a stack's experts; raise if their ranks differ from those in the config."""
    settings = [rank_and_scale(context.config, key.module) for key, _ in parts]
    if len({scale for _, scale in settings}) > 1 or len({a.dtype for _, (a, _) in parts}) > 1:
        raise ValueError(f"{context.folder}: experts of {target} have several scales or types; they must share one")
    for (key, (a, _)), (r, _) in zip(parts, settings, strict=True):
        _check_rank(context, key.module, a.shape[0], r)
    return settings[0][1]


def _equal(first: Stored, second: Stored) -> bool:
    return first.shape == second.shape and torch.equal(read_tensor(first), read_tensor(second))


def _check_rank(context: FileContext, name: str, stored: int, configured: int) -> None:
    if stored != configured:
        raise ValueError(
            f"{context.folder}: {name} has rank {stored}, but {CONFIG} says {configured}; its scale would be wrong"
        )


def _check_fits(context: FileContext, target: str, shape: Shape, tensor: Stored) -> None:
    if tensor.dtype not in FLOAT_TYPES:
        raise ValueError(
            f"{context.folder}: {tensor.name} is stored as {tensor.dtype}; it must be one of {', '.join(FLOAT_TYPES)}"
        )
    if context.shapes is None or context.shapes.get(target) == shape:
        return
    if target not in context.shapes:
        tied = " (it ties its head to its embedding)" if target == HEAD else ""
        raise ValueError(
            f"{context.folder}: {tensor.name} changes {target}, which this base does not have{tied}. The adapter is "
            f"for another model"
        )
    raise ValueError(
        f"{context.folder}: {tensor.name} is for {target} of shape {list(shape)}, but this base has "
        f"{list(context.shapes[target])}. The adapter is for another size, or its experts are transposed"
    )
