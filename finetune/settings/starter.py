"""Builds a small recipe for a user from a shipped one and a few facts, with a comment per line. Loads no torch."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from data.prepare.found import UserData
from finetune.architecture.families import Family
from finetune.architecture.parts import PARTS
from finetune.architecture.shapes import parameter_counts
from finetune.config import RunConfig
from finetune.settings.published import SMALLEST
from finetune.settings.recipes import effective, load_recipe
from finetune.settings.typed import leaves

GOALS = {
    "general": "qwen3-vl-30b-a3b-lora",
    "documents": "documents",
    "screenshots": "screenshots",
    "medical": "medical",
    "long-video": "long-video",
    "full": "qwen3-vl-30b-a3b-full",
    "router": "qwen3-vl-30b-a3b-router",
}
"""The goals of users, each with the shipped recipe that provides its values."""
LARGEST = ("qwen3-vl-235b-a22b", "qwen3-vl-235b-a22b-lora")
TOY = "tiny-cpu"
"""The recipe for bases that are too small for any published value."""
EPOCHS = {"full": 1.0}
EVALUATIONS = 10
FEWEST_STEPS = 20
"""Least steps of an epoch; if necessary, steps get fewer packs."""
SAMPLE_TOKENS = 1024
"""Estimated tokens of a sample before a tokenizer has seen it: an image and a few sentences."""

WHY = {
    "model.path": "the base model: a folder, or a hub id to download",
    "model.family": "the base's shape, until it is downloaded",
    "adapters.attention": "every token passes through these matrices",
    "adapters.experts": "each expert sees only some of the tokens",
    "adapters.router": "a small change sends tokens to other experts",
    "adapters.mlp": "the dense layers",
    "adapters.vision_blocks": "the tower that sees images",
    "adapters.merger": "from the tower to the decoder",
    "adapters.deepstack_mergers": "from the tower into the first layers of the decoder",
    "adapters.norms": "trained with what they scale",
    "moe.balance": "balances the experts over the tokens of all ranks",
    "moe.router_float32": "rounding does not decide near ties of experts",
    "parallel.ep": "GPUs over which the experts of a layer are spread",
    "parallel.sp": "GPUs that share a row",
    "parallel.resident": "frozen: each GPU holds all its frozen weights; none: a part",
    "parallel.recompute": "what backward recomputes to save memory",
    "parallel.tile_tokens": "tokens that experts and norms process at a time",
    "data.packs_per_step": "rows per step, over all GPUs together",
    "data.tokens_per_pack": "tokens of a row, which holds complete samples",
    "data.remainder": "with few rows, the last step of an epoch may be smaller",
    "data.overlong": "samples that do not fit a row are left out and counted",
    "data.image.min_tokens": "smaller images are enlarged; a server must have the same limits",
    "data.image.max_tokens": "larger images are reduced: raise it for small print",
    "data.video.fps": "frames per second",
    "data.video.max_frames": "frames of a longer video are further apart",
    "data.video.max_tokens": "tokens of one video",
    "data.video.max_tokens_per_frame": "tokens of two frames",
    "data.video.timestamps": "how times are written into the text",
    "data.sources.train": "the training data: shards or rows",
    "eval.every_steps": "steps from one evaluation to the next",
    "eval.metric": "the checkpoint with its best value is kept as well",
    "eval.sources.held-out": "never trained on",
    "optim.lr": "the highest learning rate",
    "optim.weight_decay": "pulls weights towards zero, for small data sets",
    "schedule.epochs": "passes over the data; or set schedule.steps",
    "schedule.warmup_steps": "steps in which the rate rises",
}
"""The comment of each key's line."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The hardware, data and goal of a user."""

    goal: str
    model: str
    family: str
    """The family of a model given as a hub id; empty for a folder."""
    gpus: int
    data: UserData


def starter(facts: Facts, base: Family) -> dict[str, Any]:
    """Return the keys of the recipe as a tree: those of the goal's shipped recipe, fitted to this base and data."""
    shipped, _ = load_recipe(_recipe(facts.goal, base))
    values, defaults = leaves(effective(shipped)), leaves(effective(RunConfig()))
    kept = ("moe.", "data.image.", "data.video.", "optim.", "parallel.tile_tokens")
    tree: dict[str, Any] = {"model": {"path": facts.model} | ({"family": facts.family} if facts.family else {})}
    tree["adapters"] = _adapters(shipped, base)
    for key, value in values.items():
        if key.startswith(kept) and (key == "optim.lr" or value != defaults.get(key)):
            _set(tree, key, value)
    if "router" not in tree["adapters"]:
        tree.pop("moe", None)
    packs = _packs(shipped, facts)
    tree["parallel"] = {"ep": 1} | tree.get("parallel", {})
    tree.setdefault("data", {})
    tree["data"] = {"packs_per_step": packs, "tokens_per_pack": shipped.data.tokens_per_pack, **tree["data"]}
    tree["data"] |= {"overlong": "skip"} | ({"remainder": "keep"} if packs < shipped.data.packs_per_step else {})
    tree["data"]["sources"] = {"train": {"path": facts.data.train}}
    tree["schedule"] = {"epochs": EPOCHS.get(facts.goal, 2.0)}
    steps = _steps_of_an_epoch(facts, packs, shipped)
    if facts.data.held_out:
        every = 200 if steps is None else min(200, max(1, round(steps * tree["schedule"]["epochs"] / EVALUATIONS)))
        sources = {"held-out": {"path": facts.data.held_out}}
        tree["eval"] = {"every_steps": every, "metric": "held-out/loss", "sources": sources}
    return tree


def config_of(tree: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a recipe with these keys."""
    config, problems = load_recipe("", below=(dict(tree), "moetune init"))
    assert not problems, problems
    return config


def _recipe(goal: str, base: Family) -> str:
    if parameter_counts(base).total < SMALLEST:
        return TOY
    largest, recipe = LARGEST
    return recipe if goal == "general" and base.name == largest else GOALS[goal]


def _adapters(shipped: RunConfig, base: Family) -> dict[str, dict[str, Any]]:
    """Return the trained parts that the base has; in a dense decoder the MLP replaces the experts."""
    counts = asdict(parameter_counts(base))
    chosen = {}
    for part in PARTS:
        section = getattr(shipped.adapters, part)
        if part == "mlp" and counts["mlp"] and not counts["experts"]:
            mode = shipped.adapters.experts.mode
            section = replace(section, mode=mode, lr=shipped.adapters.experts.lr)
        if section.mode != "frozen" and counts[part]:
            values = asdict(section)
            read = ("mode", "r", "alpha", "lr") if section.mode == "lora" else ("mode", "lr")
            chosen[part] = {key: values[key] for key in read if key in values and (key != "lr" or values[key])}
    if "attention" not in chosen and "experts" not in chosen:
        chosen["attention"] = {"mode": "lora", "r": 16, "alpha": 32.0}
    return chosen


def _packs(shipped: RunConfig, facts: Facts) -> int:
    """Return the rows per step, a multiple of the GPUs; fewer if an epoch would have few steps."""
    packs = shipped.data.packs_per_step if facts.gpus > 1 else min(8, shipped.data.packs_per_step)
    rows = _rows(facts, shipped)
    if rows is not None:
        packs = min(packs, max(1, rows // FEWEST_STEPS))
    return -(-packs // facts.gpus) * facts.gpus


def _rows(facts: Facts, shipped: RunConfig) -> int | None:
    if facts.data.samples is None:
        return None
    return max(1, facts.data.samples * SAMPLE_TOKENS // max(SAMPLE_TOKENS, shipped.data.tokens_per_pack))


def _steps_of_an_epoch(facts: Facts, packs: int, shipped: RunConfig) -> int | None:
    rows = _rows(facts, shipped)
    return None if rows is None else max(1, rows // packs)


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = value


def starter_text(tree: Mapping[str, Any], head: str) -> str:
    """Return the text of a recipe, with a comment on each line."""
    lines = []
    for section in (field.name for field in fields(RunConfig) if field.name in tree):
        lines += ["", f"{section}:", *_lines(tree[section], section, 1)]
    return head + "\n".join(lines) + "\n"


def _lines(values: Mapping[str, Any], path: str, depth: int) -> list[str]:
    lines = []
    for key, value in values.items():
        dotted, indent = f"{path}.{key}", "  " * depth
        if isinstance(value, Mapping) and path not in ("adapters", "data.sources", "eval.sources"):
            lines += [f"{indent}{key}:", *_lines(value, dotted, depth + 1)]
            continue
        comment = f"  # {WHY[dotted]}"
        lines.append(f"{indent + key + ': ' + _text(value):<38}{comment}")
    return lines


def _text(value: Any) -> str:
    """Return a value as YAML in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:.1e}".replace("e-0", "e-") if 0 < abs(value) < 1e-2 else f"{value:g}"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z./][\w./-]*", value):
        return json.dumps(value, ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else str(value)
