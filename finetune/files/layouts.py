"""Layouts of the expert weights in a checkpoint's files, and the tensors of each layout. Loads no torch.

hub          gate_up_proj [E, D, 2F], down_proj [E, F, D]: the published files; transformers 4, vLLM and sglang read
             it without looking at shapes. The only layout that this package writes.
memory       gate_up_proj [E, 2F, D], down_proj [E, D, F]: saved by transformers 5, and its orientation in memory.
per_expert   experts.<e>.gate_proj.weight [F, D], up_proj, down_proj [D, F]: the text models Qwen3-MoE.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, cast, get_args

from finetune.architecture.shapes import Shape, is_expert_stack

Layout = Literal["hub", "memory", "per_expert"]
LAYOUT_KEY = "moetune.layout"
HUB_METADATA = {"format": "pt", LAYOUT_KEY: "hub"}
"""The metadata of the weight files that this package writes."""

_SINGLE = re.compile(r"\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight$")
_SETTINGS = ("auto", *get_args(Layout))


def stored_shape(name: str, shape: Shape, layout: Layout) -> Shape:
    """Return the shape in which hub or memory files store the canonical tensor `name` of shape `shape`."""
    if layout == "hub" and is_expert_stack(name):
        return (shape[0], shape[2], shape[1])
    return shape


def stored_shapes(shapes: Mapping[str, Shape], layout: Layout) -> dict[str, Shape]:
    """Return key -> shape, in files of this layout, of every tensor that a model of these canonical shapes needs."""
    stored: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if layout == "per_expert" and is_expert_stack(name):
            stored |= dict(pair for expert in range(shape[0]) for pair in single_expert(name, shape, expert))
        else:
            stored[name] = stored_shape(name, shape, layout)
    return stored


def single_expert(name: str, shape: Shape, expert: int) -> list[tuple[str, Shape]]:
    """Return the per-expert keys and shapes that stack, in order, to row `expert` of the canonical tensor `name`."""
    stem, _, kind = name.rpartition(".")
    if kind == "down_proj":
        return [(f"{stem}.{expert}.down_proj.weight", shape[1:])]
    half = (shape[1] // 2, shape[2])
    return [(f"{stem}.{expert}.gate_proj.weight", half), (f"{stem}.{expert}.up_proj.weight", half)]


def recognise(
    stored: Mapping[str, Shape],
    needed: Mapping[str, Shape],
    *,
    metadata: str | None,
    setting: str = "auto",
    where: str = "the files",
) -> Layout:
    """Return the layout of files with the keys and shapes `stored`, for a model that needs `needed`.

    The user's `setting` decides, else the metadata, else the shapes.

    Raise ValueError if the shapes contradict each other, or if they would be the same in both fused layouts: after a
    wrong guess, nothing would show that experts are transposed.
    """
    if setting not in _SETTINGS:
        raise ValueError(f"model.layout must be one of {', '.join(_SETTINGS)}, got {setting!r}")
    claim = setting if setting != "auto" else metadata
    if claim is not None:
        return _known(claim, where)
    if any(_SINGLE.search(name) for name in stored):
        return "per_expert"
    votes: dict[Layout, str] = {}
    for name, shape in needed.items():
        if not is_expert_stack(name) or name not in stored:
            continue
        hub, memory = stored_shape(name, shape, "hub"), stored_shape(name, shape, "memory")
        if hub == memory:
            raise ValueError(
                f"{where}: {name} has the shape {list(hub)} both in the hub's layout and in transformers 5's, so the "
                f"layout cannot be recognised. Set model.layout to hub (published files, transformers 4) or memory "
                f"(saved by transformers 5)"
            )
        if stored[name] == hub:
            votes.setdefault("hub", name)
        elif stored[name] == memory:
            votes.setdefault("memory", name)
    if len(votes) > 1:
        raise ValueError(
            f"{where} mix two layouts: {votes['hub']} is stored as in the hub's files, {votes['memory']} as "
            f"transformers 5 saves it. They come from two sources; fetch the folder again"
        )
    return next(iter(votes), "hub")


def _known(claim: str, where: str) -> Layout:
    if claim not in get_args(Layout):
        known = ", ".join(get_args(Layout))
        raise ValueError(f"{where}: the layout in their metadata must be one of {known}, got {claim!r}")
    return cast(Layout, claim)
