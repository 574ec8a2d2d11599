"""Longer context by YaRN: what the base's config.json becomes, what its frequencies must be, who would serve others.

Everything here is arithmetic in float64 and edits of a config.json; no torch. YaRN stretches the slow frequencies of
the rotary positions by a factor, leaves the fast ones, and scales queries and keys; theta and the sections for time,
height and width stay what they were. A config.json is read differently by each reader when it is not complete, so what
is written has the block in both spellings (rope_theta + rope_scaling of the hub, rope_parameters of transformers 5).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune.architecture.families import Family, Rope
from finetune.config import ContextConfig

BETA_FAST, BETA_SLOW = 32.0, 1.0
"""Dimensions that turn more often than the first over the original context stay; those below the second are stretched
in full."""
VLLM_MULTIPLE = 4
"""vLLM's M-RoPE hands four times the original length to the formula of the ramp, and gets other frequencies."""
TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Extension:
    """YaRN over a base: `original` is the context it was trained for, `length` the one its config.json will state."""

    factor: float
    original: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """What the rotary embedding of a model computes with."""

    inv_freq: tuple[float, ...]
    scaling: float


def extension(config: ContextConfig, base: Family) -> Extension | None:
    """What the configuration asks of the base; None where it stays as it is."""
    if config.yarn.factor is None:
        return None
    if not config.yarn.factor > 1:
        raise ValueError(f"context.yarn.factor is {config.yarn.factor:g}; a factor above 1 is wanted, or none")
    original = base.text.rope.original_max_position_embeddings or base.text.max_position_embeddings
    return Extension(
        factor=config.yarn.factor,
        original=original,
        length=config.length or int(original * config.yarn.factor),
    )


def extended_rope(rope: Rope, extended: Extension | None) -> Rope:
    """The rotary positions of the base after the extension."""
    if extended is None:
        return rope
    return replace(rope, type="yarn", factor=extended.factor, original_max_position_embeddings=extended.original)


def extended_config(config: Mapping[str, Any], extended: Extension | None) -> dict[str, Any]:
    """A config.json's object (either spelling) after the extension; sections, interleaving and theta are kept."""
    made = dict(config)
    text = dict(made["text_config"]) if "text_config" in made else made
    if extended is not None:
        old = text.get("rope_parameters") or text.get("rope_scaling") or {}
        theta = old.get("rope_theta", text.get("rope_theta"))
        kept = {key: value for key, value in old.items() if key not in ("type", "rope_type", "rope_theta")}
        block = kept | {
            "rope_type": "yarn",
            "factor": extended.factor,
            "original_max_position_embeddings": extended.original,
        }
        text |= {"max_position_embeddings": extended.length, "rope_theta": theta, "rope_scaling": block}
        text.pop("rope_parameters", None)
    if "text_config" in made:
        made["text_config"] = text
    return both_spellings(made)


def both_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json in the hub's spelling, its YaRN block in that of transformers 5 beside it; without YaRN unchanged.

    With rope_theta missing from either, or only one of the blocks given, some reader falls back to a default theta.
    """
    made = dict(config)
    text = dict(made["text_config"]) if "text_config" in made else made
    block = text.get("rope_scaling") or {}
    if block.get("rope_type") == "yarn":
        text["rope_parameters"] = {**block, "rope_theta": text["rope_theta"]}
    if "text_config" in made:
        made["text_config"] = text
    return made


# --- the reference


def rotary(rope: Rope, head_dim: int, *, ramp_over: int | None = None) -> Rotary:
    """The frequencies and the scaling of queries and keys by the formula, in float64.

    `ramp_over` is the original length that the ramp is made for, where a reader takes another than the config's.
    """
    plain = [rope.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if rope.type != "yarn":
        return Rotary(inv_freq=tuple(plain), scaling=1.0)
    assert rope.factor is not None
    assert rope.original_max_position_embeddings is not None
    original = ramp_over or rope.original_max_position_embeddings
    low, high = _ramp(rope.theta, head_dim, original)
    stretched = [min(1.0, max(0.0, (i - low) / (high - low))) for i in range(head_dim // 2)]
    inv_freq = (f * (1 - s) + f / rope.factor * s for f, s in zip(plain, stretched, strict=True))
    scaling = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return Rotary(inv_freq=tuple(inv_freq), scaling=scaling)


def _ramp(theta: float, head_dim: int, original: int) -> tuple[float, float]:
    """The dimensions between which the stretch grows from nothing to all."""

    def turns(count: float) -> float:
        return head_dim * math.log(original / (count * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(turns(BETA_FAST)), 0), min(math.ceil(turns(BETA_SLOW)), head_dim - 1)
    return low, high if high > low else low + 0.001


def check_rotary(module: Any, base: Family, extended: Extension | None) -> str:
    """Compare a built model's rotary embedding with the formula; a sentence for the start, or a ValueError.

    `module` is a transformers model with its tables filled in. A wrong table trains without an error, on other
    positions than any server will compute.
    """
    rope = extended_rope(base.text.rope, extended)
    want = rotary(rope, base.text.head_dim)
    inner = getattr(module.model, "language_model", module.model)
    found = inner.rotary_emb
    kind = str(found.inv_freq.dtype).removeprefix("torch.")
    if kind != "float32":
        raise ValueError(
            f"the rotary frequencies are {kind}: in less than float32 positions blur within a few thousand"
        )
    got = found.inv_freq.double().tolist()
    if len(got) != len(want.inv_freq):
        raise ValueError(f"the model has {len(got)} rotary frequencies, {base.name} has {len(want.inv_freq)}")
    off = [abs(g - w) / w for g, w in zip(got, want.inv_freq, strict=True)]
    worst = max(range(len(off)), key=off.__getitem__)
    if off[worst] > TOLERANCE or abs(found.attention_scaling - want.scaling) > TOLERANCE:
        raise ValueError(
            f"the model's rotary positions are not those of its configuration ({_say(rope)}): frequency {worst} is "
            f"{got[worst]:.6g}, not {want.inv_freq[worst]:.6g}; queries and keys are scaled by "
            f"{found.attention_scaling:.6g}, not {want.scaling:.6g}. Nothing would be learned for the positions that "
            f"a server computes. Look at rope_theta and rope_scaling of the base's config.json"
        )
    section = getattr(found, "mrope_section", None)
    if section is not None and tuple(section) != rope.mrope_section:
        raise ValueError(
            f"the model rotates time, height and width by {list(section)}, config.json says {list(rope.mrope_section)}"
        )
    return f"rotary positions: {_say(rope)}; {len(off)} frequencies as in float64 (largest error {max(off):.0e})"


def _say(rope: Rope) -> str:
    yarn = f"yarn x {rope.factor:g} over {rope.original_max_position_embeddings:,}, " if rope.type == "yarn" else ""
    return f"{yarn}theta {rope.theta:,.0f}, sections {'/'.join(map(str, rope.mrope_section))}"


# --- what the user should know


def need_lines(base: Family, extended: Extension | None, *, largest: int, exact: bool, sample: str) -> list[str]:
    """What the largest position of the data says about the extension: one sentence for the start, warnings marked."""
    native = base.text.rope.original_max_position_embeddings or base.text.max_position_embeddings
    at = f"the largest position in the data is {'' if exact else 'below '}{largest:,}"
    at += f" ({sample})" if exact else ""
    share = largest / native
    if extended is None and base.text.rope.type == "yarn":
        native = base.text.max_position_embeddings
    if extended is None:
        if largest <= native:
            return [f"context: {at}, within the base's {native:,}"]
        return [
            f"warning: {at}, beyond the {native:,} that the base was trained for. Set context.yarn.factor="
            f"{min(3, math.ceil(share))} (a factor of {share:.2f} is needed), or leave such samples out"
        ]
    lines = [f"context: {at}: a factor of {max(share, 1):.2f} is needed, context.yarn.factor is {extended.factor:g}"]
    if largest <= extended.original:
        lines.append(
            f"warning: context.yarn.factor={extended.factor:g} is not needed: {at}, within the {extended.original:,} "
            f"of the base. YaRN is static and changes short contexts too. Leave context.yarn out"
        )
    elif share > extended.factor:
        lines.append(
            f"warning: context.yarn.factor={extended.factor:g} reaches position "
            f"{int(extended.original * extended.factor):,}: {at}. Set {math.ceil(share)} or leave such samples out"
        )
    return lines


def serving_lines(base: Family, extended: Extension | None) -> list[str]:
    """How to serve what was trained: flags for the servers, and where a server's own formula differs."""
    rope, head_dim = extended_rope(base.text.rope, extended), base.text.head_dim
    if rope.type != "yarn":
        return []
    original = rope.original_max_position_embeddings
    assert original is not None
    length = extended.length if extended else base.text.max_position_embeddings
    ours = rotary(rope, head_dim).inv_freq
    theirs = rotary(rope, head_dim, ramp_over=VLLM_MULTIPLE * original).inv_freq
    off = [abs(a - b) / a for a, b in zip(ours, theirs, strict=True)]
    lines = [f"serve with sglang: --context-length {length} (it computes the same frequencies)"]
    if max(off) <= TOLERANCE:
        return [*lines, f"serve with vLLM: --max-model-len {length}"]
    block = {
        "rope_type": "yarn", "factor": rope.factor, "original_max_position_embeddings": original // VLLM_MULTIPLE,
        "mrope_section": list(rope.mrope_section), "mrope_interleaved": rope.mrope_interleaved,
        "rope_theta": rope.theta,
    }  # fmt: skip
    overrides = json.dumps({"text_config": {"rope_parameters": block, "max_position_embeddings": length}})
    return [
        *lines,
        f"warning: vLLM's M-RoPE makes the ramp for {VLLM_MULTIPLE} x {original:,} positions: "
        f"{sum(x > TOLERANCE for x in off)} of {len(off)} frequencies would differ, by up to {max(off):.0%}. "
        f"Serve with vLLM: --max-model-len {length} --hf-overrides '{overrides}'",
    ]
