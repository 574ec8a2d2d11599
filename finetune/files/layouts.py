"""How a checkpoint's files hold the expert weights, and what every layout's files must contain. Loads no torch.

hub          gate_up_proj [E, D, 2F], down_proj [E, F, D]: what the published files hold, and what transformers 4, vLLM
             and sglang read without looking at shapes. The only layout this package writes.
memory       gate_up_proj [E, 2F, D], down_proj [E, D, F]: what transformers 5 saves and holds in memory.
per_expert   experts.<e>.gate_proj.weight [F, D], up_proj, down_proj [D, F]: the text Qwen3-MoE models' way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, cast, get_args

from finetune.architecture.shapes import Shape, is_expert_stack

Layout = Literal["hub", "memory", "per_expert"]
LAYOUT_KEY = "moetune.layout"
HUB_METADATA = {"format": "pt", LAYOUT_KEY: "hub"}
"""What the weight files that this package writes say of themselves."""

_SINGLE = re.compile(r"\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight$")
_SETTINGS = ("auto", *get_args(Layout))


def stored_shape(name: str, shape: Shape, layout: Layout) -> Shape:
    """The shape under which hub or memory files hold the canonical tensor `name` of shape `shape`."""
    if layout == "hub" and is_expert_stack(name):
        return (shape[0], shape[2], shape[1])
    return shape


def stored_shapes(shapes: Mapping[str, Shape], layout: Layout) -> dict[str, Shape]:
    """Key -> shape in files of this layout of everything that a model of these canonical shapes needs."""
    stored: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if layout == "per_expert" and is_expert_stack(name):
            stored |= dict(pair for expert in range(shape[0]) for pair in single_expert(name, shape, expert))
        else:
            stored[name] = stored_shape(name, shape, layout)
    return stored


def single_expert(name: str, shape: Shape, expert: int) -> list[tuple[str, Shape]]:
    """The per-expert keys and shapes that stack up, in order, to row `expert` of the canonical tensor `name`."""
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

    Raises where the shapes contradict each other, or where they would be the same in both fused layouts: a wrong
    guess would load transposed experts without any other sign.
    """
    if setting not in _SETTINGS:
        raise ValueError(f"model.layout is {setting!r}; allowed are {', '.join(_SETTINGS)}")
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
                f"{where}: {name} has the shape {list(hub)} in the hub's layout and in transformers 5's alike, so "
                f"the files cannot say which one they hold. Set model.layout to hub (published files, transformers 4) "
                f"or memory (saved by transformers 5)"
            )
        if stored[name] == hub:
            votes.setdefault("hub", name)
        elif stored[name] == memory:
            votes.setdefault("memory", name)
    if len(votes) > 1:
        raise ValueError(
            f"{where} mix two layouts: {votes['hub']} is stored as in the hub's files, {votes['memory']} as "
            f"transformers 5 saves it. They come from two sources; get the folder anew"
        )
    return next(iter(votes), "hub")


def _known(claim: str, where: str) -> Layout:
    if claim not in get_args(Layout):
        raise ValueError(f"{where}: their metadata names the layout {claim!r}; known are {', '.join(get_args(Layout))}")
    return cast(Layout, claim)
