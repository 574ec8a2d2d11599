"""From the pairs (A, B) of an adapter file to changes of a base's tensors; what is ambiguous or misfits is refused.

PEFT below 0.19.1 took transformers 5's [E, out, in] for [E, in, out], so that its A and B are swapped and turned. Which
way a file has it is said by its metadata, else by its shapes, else the file is refused: a wrong guess gives a change of
the right size and no meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.adapters.change import Change, Form, read_stored
from finetune.adapters.keys import Key, only_stack, rank_and_scale, turns_parameters
from finetune.architecture.shapes import EMBEDDING, HEAD, Shape, is_expert_stack
from finetune.files.tensorfile import FLOAT_TYPES, Stored

CONFIG = "adapter_config.json"
ORIENTATION = "moetune.orientation"


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Puts the pairs of one file together into changes, and holds them against a base's shapes where there is one."""

    folder: Path
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    shapes: Mapping[str, Shape] | None

    def changes(self, pairs: Mapping[Key, tuple[Stored, Stored]]) -> dict[str, Change]:
        """Return the changes by the base tensor that each is added to."""
        packed: dict[str, tuple[Stored, Stored]] = {}
        singles: dict[str, dict[tuple[int, str], tuple[Key, Stored, Stored]]] = {}
        found: dict[str, Change] = {}
        inner = {key.module.removesuffix(".base_layer") for key in pairs if key.is_inner}
        for key, (a, b) in pairs.items():
            if key.part is not None:
                stack = f"{key.stem}.{'down_proj' if key.part == 'down' else 'gate_up_proj'}"
                singles.setdefault(stack, {})[key.expert, key.part] = (key, a, b)
            elif key.is_inner:
                packed[f"{key.module.removesuffix('.base_layer')}.gate_up_proj"] = (a, b)
            elif key.is_outer:
                packed[f"{key.module}.{self._outer(key.module, key.module in inner)}"] = (a, b)
            else:
                target = f"{key.module}.weight"
                named = target if key.module.endswith(".mlp.gate") else key.module  # the router is a parameter to PEFT
                found[target] = self._dense(target, named, a, b)
        both = {**packed, **singles}
        if len(both) != len(packed) + len(singles):
            raise ValueError(f"{self.folder}: {sorted(packed.keys() & singles.keys())[0]} is given twice, in two forms")
        turned = self._turned(packed)
        found |= {name: self._packed(name, a, b, turned) for name, (a, b) in packed.items()}
        return found | {name: self._single(name, parts) for name, parts in singles.items()}

    def check_full(self, name: str, tensor: Stored) -> None:
        """A tensor in full must be the base's, in its shape; a stack of experts in a known orientation."""
        self._fits(name, tuple(tensor.shape), tensor)
        shape = tuple(tensor.shape)
        if name == EMBEDDING and self.shapes is not None and HEAD not in self.shapes:
            raise ValueError(
                f"{self.folder} replaces {name} alone, and this base ties its head to it: PEFT left the head as it was "
                f"and one tensor cannot be both. Merge it with PEFT, which writes a head of its own"
            )
        if is_expert_stack(name) and shape[1] == shape[2] and ORIENTATION not in self.metadata:
            raise ValueError(
                f"{self.folder}: {name} {list(shape)} has the same shape turned, and no metadata says which way it lies"
            )

    def _outer(self, module: str, has_inner: bool) -> str:
        if has_inner:
            return "down_proj"
        named = only_stack(self.config)
        if named is None:
            raise ValueError(
                f"{self.folder}: {module} has factors of one stack only, and target_parameters in {CONFIG} do not say "
                f"whether they are gate_up_proj's or down_proj's"
            )
        return named

    def _dense(self, target: str, named: str, a: Stored, b: Stored) -> Change:
        r, scale = rank_and_scale(self.config, named)
        self._check_rank(target, a.shape[0], r)
        shape = (b.shape[0], a.shape[1])
        self._fits(target, shape, a)
        return Change(target=target, shape=shape, r=r, scale=scale, form="dense", parts=((a, b),))

    def _packed(self, target: str, a: Stored, b: Stored, turned: bool) -> Change:
        r, scale = rank_and_scale(self.config, target)
        experts, rest = divmod(a.shape[0], r)
        if self.shapes is not None and target in self.shapes:
            experts = self.shapes[target][0]
            rest = a.shape[0] - r * experts
        if rest or not experts:
            raise ValueError(
                f"{self.folder}: {target} has {a.shape[0]} rows in lora_A; with r {r} by {CONFIG} that is not "
                f"{'a whole number of' if self.shapes is None else experts} experts"
            )
        out, into = (a.shape[1], b.shape[0]) if turned else (b.shape[0], a.shape[1])
        self._fits(target, (experts, out, into), a)
        form: Form = "packed, turned" if turned else "packed"
        return Change(target=target, shape=(experts, out, into), r=r, scale=scale, form=form, parts=((a, b),))

    def _turned(self, packed: Mapping[str, tuple[Stored, Stored]]) -> bool:
        """Whether A and B of experts are swapped, as PEFT below 0.19.1 has them; one file is of one kind."""
        if ORIENTATION in self.metadata or not packed:
            return False
        votes: dict[bool, str] = {}
        for name, (a, b) in packed.items():
            straight, swapped = self._ways(name, (b.shape[0], a.shape[1]), packed)
            if straight != swapped:
                votes.setdefault(swapped, name)
        if len(votes) == 2:
            raise ValueError(
                f"{self.folder} mixes two orientations: {votes[False]} is [out, in] as PEFT 0.19.1 and newer write it, "
                f"{votes[True]} is turned as older ones do. It was put together from two sources"
            )
        if votes:
            return next(iter(votes))
        name, (a, b) = next(iter(packed.items()))
        if not any(self._ways(name, (b.shape[0], a.shape[1]), packed)):
            return False  # fits neither way: the comparison with the base says so
        if turns_parameters(self.config):
            return False
        raise ValueError(
            f"{self.folder}: {name} has factors {list(a.shape)} and {list(b.shape)}, which fit this base both as PEFT "
            f"0.19.1 and newer write them and turned, as older ones do; nothing in the file says which. Save it again "
            f"with PEFT 0.19.1 or newer, or merge it with the PEFT that wrote it"
        )

    def _ways(
        self, name: str, found: tuple[int, int], packed: Mapping[str, tuple[Stored, Stored]]
    ) -> tuple[bool, bool]:
        """Whether (out, in) of a stack fit as they are, and turned: by the base, or else the layer's other stack."""
        if self.shapes is not None:
            _, out, into = self.shapes.get(name, (0, 0, 0))
            return found == (out, into), found == (into, out)
        stem, _, kind = name.rpartition(".")
        other = packed.get(f"{stem}.{'down_proj' if kind == 'gate_up_proj' else 'gate_up_proj'}")
        if other is None:
            return True, True
        pair = (other[1].shape[0], other[0].shape[1])
        (up_out, up_in), (down_out, down_in) = (found, pair) if kind == "gate_up_proj" else (pair, found)
        return up_in == down_out and up_out == 2 * down_in, up_out == down_in and up_in == 2 * down_out

    def _single(self, target: str, parts: Mapping[tuple[int, str], tuple[Key, Stored, Stored]]) -> Change:
        kinds = ("down",) if target.endswith("down_proj") else ("gate", "up")
        experts = max(expert for expert, _ in parts) + 1
        if self.shapes is not None and target in self.shapes:
            experts = self.shapes[target][0]
        wanted = [(expert, kind) for expert in range(experts) for kind in kinds]
        missing = [f"{expert}.{kind}" for expert, kind in wanted if (expert, kind) not in parts]
        if missing or len(parts) != len(wanted):
            more = sorted(f"{expert}.{kind}" for expert, kind in parts if expert >= experts)
            raise ValueError(
                f"{self.folder}: {target} must have factors of {experts} experts; "
                + (f"missing: {', '.join(missing[:6])}" if missing else f"too many: {', '.join(more[:6])}")
            )
        settings = {rank_and_scale(self.config, parts[place][0].module) for place in wanted}
        if len({scale for _, scale in settings}) > 1 or len({parts[place][1].dtype for place in wanted}) > 1:
            raise ValueError(f"{self.folder}: experts of {target} have several scales or types; one for all is read")
        for place in wanted:
            key, a, _ = parts[place]
            self._check_rank(key.module, a.shape[0], rank_and_scale(self.config, key.module)[0])
        stored = tuple((parts[place][1], parts[place][2]) for place in wanted)
        shares = len(kinds) == 2 and all(
            stored[at][0].shape == stored[at + 1][0].shape
            and torch.equal(read_stored(stored[at][0]), read_stored(stored[at + 1][0]))
            for at in range(0, len(stored), 2)
        )
        widths = [sum(a.shape[0] for a, _ in stored[at : at + len(kinds)]) for at in range(0, len(stored), len(kinds))]
        shape = (experts, sum(b.shape[0] for _, b in stored[: len(kinds)]), stored[0][0].shape[1])
        if any((a.shape[1], b.shape[0] * len(kinds)) != (shape[2], shape[1]) for a, b in stored):
            raise ValueError(
                f"{self.folder}: experts of {target} differ in their dimensions; the file is not of one model"
            )
        self._fits(target, shape, stored[0][0])
        return Change(
            target=target, shape=shape, r=max(widths) // (2 if shares else 1), scale=settings.pop()[1], form="single",
            parts=stored, shares_a=shares,
        )  # fmt: skip

    def _check_rank(self, name: str, found: int, said: int) -> None:
        if found != said:
            raise ValueError(f"{self.folder}: {name} has rank {found}, {CONFIG} says {said}; its scale would be wrong")

    def _fits(self, target: str, shape: Shape, tensor: Stored) -> None:
        if tensor.dtype not in FLOAT_TYPES:
            raise ValueError(
                f"{self.folder}: {tensor.name} is stored as {tensor.dtype}; {', '.join(FLOAT_TYPES)} are read"
            )
        if self.shapes is None or self.shapes.get(target) == shape:
            return
        if target not in self.shapes:
            tied = " (it ties its head to its embedding)" if target == HEAD else ""
            raise ValueError(
                f"{self.folder}: {tensor.name} changes {target}, which this base does not have{tied}. The adapter is "
                f"for another model"
            )
        raise ValueError(
            f"{self.folder}: {tensor.name} is for {target} of shape {list(shape)}, this base has "
            f"{list(self.shapes[target])}. The adapter is for another size, or its experts are turned"
        )
