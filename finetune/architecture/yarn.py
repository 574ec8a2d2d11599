"""Longer context by YaRN: the config.json that the base gets, its frequencies, and servers that compute other ones.

Everything here is arithmetic in float64 and edits of a config.json; no torch. YaRN stretches the slow frequencies of
the rotary positions by a factor, leaves the fast ones as they are, and scales queries and keys; theta and the sections
for time, height and width do not change. Readers of an incomplete config.json make different assumptions, so the block
is written in both spellings (rope_theta + rope_scaling of the hub, rope_parameters of transformers 5).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.architecture.families import Family, Rope
from finetune.config import ContextConfig

BETA_FAST = 32.0
"""Turns over the original context above which a dimension stays as it is."""
BETA_SLOW = 1.0
"""Turns over the original context below which a dimension is stretched fully."""
VLLM_MULTIPLE = 4
"""Multiple of the original length that vLLM's M-RoPE used in the formula of the ramp until 0.32: other frequencies."""
TOLERANCE = 1e-6
"""Relative difference between frequencies that counts as rounding."""


@dataclass(frozen=True, kw_only=True)
class Extension:
    """YaRN on a base: `original` is the context that it was trained for, `length` the one in the new config.json."""

    factor: float
    original: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """The numbers that the rotary embedding of a model uses."""

    inv_freq: tuple[float, ...]
    scaling: float


def extension(config: ContextConfig, base: Family) -> Extension | None:
    """Return how the configuration extends the base's context; None if it stays as it is."""
    if config.yarn.factor is None:
        return None
    if not config.yarn.factor > 1:
        raise ValueError(f"context.yarn.factor must be above 1, or unset, got {config.yarn.factor:g}")
    original = base.text.rope.original_max_position_embeddings or base.text.max_position_embeddings
    return Extension(
        factor=config.yarn.factor,
        original=original,
        length=config.length or int(original * config.yarn.factor),
    )


def extended_rope(rope: Rope, extended: Extension | None) -> Rope:
    """Return the rotary positions of the base after the extension."""
    if extended is None:
        return rope
    return replace(rope, type="yarn", factor=extended.factor, original_max_position_embeddings=extended.original)


def extended_config(config: Mapping[str, Any], extended: Extension | None) -> dict[str, Any]:
    """Return a config.json (in either spelling) after the extension; sections, interleaving and theta stay."""
    result = dict(config)
    text = dict(result["text_config"]) if "text_config" in result else result
    if extended is not None:
        old = text.get("rope_parameters") or text.get("rope_scaling") or {}
        theta = old.get("rope_theta", text.get("rope_theta"))
        unchanged = {key: value for key, value in old.items() if key not in ("type", "rope_type", "rope_theta")}
        block = unchanged | {
            "rope_type": "yarn",
            "factor": extended.factor,
            "original_max_position_embeddings": extended.original,
        }
        text |= {"max_position_embeddings": extended.length, "rope_theta": theta, "rope_scaling": block}
        text.pop("rope_parameters", None)
    if "text_config" in result:
        result["text_config"] = text
    return both_spellings(result)


def both_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json in the hub's spelling; a YaRN block is added in the spelling of transformers 5.

    If rope_theta is missing from either block, or one of the blocks is missing, some reader uses a default theta.
    """
    result = dict(config)
    text = dict(result["text_config"]) if "text_config" in result else result
    block = text.get("rope_scaling") or {}
    if block.get("rope_type") == "yarn":
        text["rope_parameters"] = {**block, "rope_theta": text["rope_theta"]}
    if "text_config" in result:
        result["text_config"] = text
    return result


# --- the reference


def rotary(rope: Rope, head_dim: int, *, ramp_over: int | None = None) -> Rotary:
    """Return the frequencies and the scaling of queries and keys by the formula, in float64.

    `ramp_over` is the original length that the ramp is made for, for a reader that does not use the config's.
    """
    plain = [rope.theta ** (-2 * dim / head_dim) for dim in range(head_dim // 2)]
    if rope.type != "yarn":
        return Rotary(inv_freq=tuple(plain), scaling=1.0)
    assert rope.factor is not None
    assert rope.original_max_position_embeddings is not None
    original = ramp_over or rope.original_max_position_embeddings
    low, high = _ramp(rope.theta, head_dim, original)
    stretched = [min(1.0, max(0.0, (dim - low) / (high - low))) for dim in range(head_dim // 2)]
    inv_freq = (
        frequency * (1 - share) + frequency / rope.factor * share
        for frequency, share in zip(plain, stretched, strict=True)
    )
    scaling = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return Rotary(inv_freq=tuple(inv_freq), scaling=scaling)


def _ramp(theta: float, head_dim: int, original: int) -> tuple[float, float]:
    """Return the dimensions between which the stretch grows from none to full."""

    def turns(count: float) -> float:
        return head_dim * math.log(original / (count * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(turns(BETA_FAST)), 0), min(math.ceil(turns(BETA_SLOW)), head_dim - 1)
    return low, high if high > low else low + 0.001


def check_rotary(module: Any, base: Family, extended: Extension | None) -> str:
    """Compare a built model's rotary embedding with the formula; return a line to print at start, or raise ValueError.

    `module` is a transformers model with its tables filled in. With a wrong table, training raises no error but uses
    other positions than any server will compute.
    """
    rope = extended_rope(base.text.rope, extended)
    formula = rotary(rope, base.text.head_dim)
    table = getattr(module.model, "language_model", module.model).rotary_emb
    dtype = str(table.inv_freq.dtype).removeprefix("torch.")
    if dtype != "float32":
        raise ValueError(
            f"the rotary frequencies must be float32, got {dtype}: in fewer bits, positions blur after a few thousand "
            f"tokens"
        )
    frequencies = table.inv_freq.double().tolist()
    if len(frequencies) != len(formula.inv_freq):
        raise ValueError(
            f"the model has {len(frequencies)} rotary frequencies, but {base.name} has {len(formula.inv_freq)}"
        )
    errors = _relative(formula.inv_freq, frequencies)
    worst = max(range(len(errors)), key=errors.__getitem__)
    if errors[worst] > TOLERANCE or abs(table.attention_scaling - formula.scaling) > TOLERANCE:
        raise ValueError(
            f"the model's rotary positions differ from its configuration ({_words(rope)}): frequency {worst} is "
            f"{frequencies[worst]:.6g}, not {formula.inv_freq[worst]:.6g}; queries and keys are scaled by "
            f"{table.attention_scaling:.6g}, not {formula.scaling:.6g}. Training would use other positions than a "
            f"server computes. Check rope_theta and rope_scaling in the base's config.json"
        )
    section = getattr(table, "mrope_section", None)
    if section is not None and tuple(section) != rope.mrope_section:
        raise ValueError(
            f"the model rotates time, height and width by {list(section)}, but config.json says "
            f"{list(rope.mrope_section)}"
        )
    largest = f"largest error {max(errors):.0e}"
    return f"rotary positions: {_words(rope)}; {len(errors)} frequencies equal the float64 formula ({largest})"


def _relative(formula: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return the distance of each frequency from that of the formula, relative to it."""
    return [abs(ours - other) / ours for ours, other in zip(formula, others, strict=True)]


def _words(rope: Rope) -> str:
    yarn = f"yarn x {rope.factor:g} over {rope.original_max_position_embeddings:,}, " if rope.type == "yarn" else ""
    return f"{yarn}theta {rope.theta:,.0f}, sections {'/'.join(map(str, rope.mrope_section))}"


# --- lines for the user


def need_lines(base: Family, extended: Extension | None, *, largest: int, exact: bool, sample: str) -> list[str]:
    """Return lines, with warnings marked, on whether the largest position in the data needs the extension."""
    native = base.text.rope.original_max_position_embeddings or base.text.max_position_embeddings
    position = f"the largest position in the data is {'' if exact else 'below '}{largest:,}"
    position += f" ({sample})" if exact else ""
    share = largest / native
    if extended is None and base.text.rope.type == "yarn":
        native = base.text.max_position_embeddings
    if extended is None:
        if largest <= native:
            return [f"context: {position}, within the base's {native:,}"]
        return [
            f"warning: {position}, beyond the {native:,} positions that the base was trained for. Set "
            f"context.yarn.factor={min(3, math.ceil(share))} (a factor of {share:.2f} is needed), or leave out such "
            f"samples"
        ]
    lines = [
        f"context: {position}: a factor of {max(share, 1):.2f} is needed, context.yarn.factor is {extended.factor:g}"
    ]
    if largest <= extended.original:
        lines.append(
            f"warning: context.yarn.factor={extended.factor:g} is not needed: {position}, within the "
            f"{extended.original:,} of the base. YaRN is static and changes short contexts too. Leave out context.yarn"
        )
    elif share > extended.factor:
        reached = int(extended.original * extended.factor)
        lines.append(
            f"warning: context.yarn.factor={extended.factor:g} reaches position {reached:,}: {position}. "
            f"Set it to {math.ceil(share)}, or leave out such samples"
        )
    return lines


def serving_lines(base: Family, extended: Extension | None) -> list[str]:
    """Return how to serve the trained model: flags for the servers, and where a server's own formula differs."""
    rope = extended_rope(base.text.rope, extended)
    if rope.type != "yarn":
        return []
    length = extended.length if extended else base.text.max_position_embeddings
    lines = [
        f"serve with sglang: --context-length {length} (it computes the same frequencies)",
        f"serve with vLLM 0.32: --max-model-len {length} (it computes the same frequencies)",
    ]
    errors = _vllm_errors(rope, base.text.head_dim)
    if max(errors) <= TOLERANCE:
        return lines
    assert rope.original_max_position_embeddings is not None
    block = vllm_rope(rope) | {
        "original_max_position_embeddings": rope.original_max_position_embeddings // VLLM_MULTIPLE
    }
    overrides = json.dumps({"text_config": {"rope_parameters": block, "max_position_embeddings": length}})
    return [
        *lines,
        f"warning: older releases of vLLM make the ramp for {VLLM_MULTIPLE} x "
        f"{rope.original_max_position_embeddings:,} positions: {sum(error > TOLERANCE for error in errors)} of "
        f"{len(errors)} frequencies would differ, by up to {max(errors):.0%}. There, and only there, add "
        f"--hf-overrides '{overrides}'",
    ]


def vllm_rope(rope: Rope) -> dict[str, Any]:
    """Return the `rope_parameters` of a context extended by YaRN, as vLLM's overrides take them."""
    return {
        "rope_type": rope.type,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "mrope_section": list(rope.mrope_section),
        "mrope_interleaved": rope.mrope_interleaved,
        "rope_theta": rope.theta,
    }


def _vllm_errors(rope: Rope, head_dim: int) -> list[float]:
    """Return how far the frequencies of older releases of vLLM are from the formula's, one by one."""
    assert rope.original_max_position_embeddings is not None
    vllm = rotary(rope, head_dim, ramp_over=VLLM_MULTIPLE * rope.original_max_position_embeddings)
    return _relative(rotary(rope, head_dim).inv_freq, vllm.inv_freq)
