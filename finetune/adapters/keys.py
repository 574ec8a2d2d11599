"""Parse the tensor names and configs of adapter files, ours and other tools'. Loads no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe.names import PEFT_PREFIX

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CARD = "README.md"

FAMILIES_KEY = "moetune.families"
"""Metadata of our own files: how each part was trained."""
MODEL_TYPE_KEY = "moetune.model_type"
ORIENTATION_KEY = "moetune.orientation"
CHANGES_KEY = "moetune.changes"
"""Metadata of an exported file: the number of base tensors that it changes."""
SINGLE_FORM = "form per-expert"
ORIENTATION = "experts [out, in], lora_A expert by expert, lora_B rank by rank"

_FACTOR = re.compile(r"^(?P<module>.+?)\.lora_(?P<factor>[AB])(?:\.default)?\.weight$")
_SINGLE = re.compile(
    r"^(?P<stem>.+\.mlp\.experts)\.(?P<expert>\d+)\.(?P<projection>gate_proj|up_proj|down_proj|w1|w2|w3)$"
)
_PROJECTIONS: Mapping[str, Projection] = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
}
_NOT_LOW_RANK = ("lora_magnitude_vector", "lora_embedding_", "lora_bias", "lora_A.bias", "lora_B.bias", "lora_E")
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq")
_OTHER_FORMS = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
)

Projection = Literal["gate", "up", "down"]


@dataclass(frozen=True, kw_only=True)
class Key:
    """One factor: its module by PEFT's name and, for experts stored one by one, the expert and the projection."""

    module: str
    factor: Literal["A", "B"]
    stem: str = ""
    expert: int = -1
    projection: Projection | None = None

    @property
    def is_inner(self) -> bool:
        """Return whether the factor is inside down_proj's wrapper, as gate_up_proj's are: PEFT wraps it first."""
        return self.module.endswith(".mlp.experts.base_layer")

    @property
    def is_outer(self) -> bool:
        """Return whether the factor lies in the outer wrapper: that of down_proj, or of the only adapted stack."""
        return self.module.endswith(".mlp.experts")


def parse_key(name: str, where: Path) -> Key | str:
    """Parse the name of a tensor in an adapter file: return a factor, or the canonical name of a full tensor."""
    bare = name.removeprefix(PEFT_PREFIX)
    parsed = _FACTOR.match(bare)
    if parsed is None:
        if any(word in bare for word in _NOT_LOW_RANK) or ".lora_" in bare:
            raise ValueError(
                f"{where}: {name} is not a plain low-rank factor (DoRA, LoRA embeddings and biases are not supported). "
                f"Merge that adapter with the tool that made it"
            )
        return re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", bare)
    module = parsed["module"]
    factor: Literal["A", "B"] = "A" if parsed["factor"] == "A" else "B"
    single = _SINGLE.match(module)
    if single is None:
        return Key(module=module, factor=factor)
    projection = _PROJECTIONS[single["projection"]]
    return Key(module=module, factor=factor, stem=single["stem"], expert=int(single["expert"]), projection=projection)


def check_config(config: Mapping[str, Any], where: Path) -> None:
    """Raise unless the config describes plain LoRA on the unchanged base."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"{where}: peft_type is {kind}; only LORA is supported")
    used = [key for key in _OTHER_FORMS if config.get(key)]
    if used:
        raise ValueError(f"{where}: {used[0]} is {config[used[0]]!r}; only plain LoRA, B times A, is supported")
    bias = config.get("bias") or "none"
    if bias != "none":
        raise ValueError(
            f"{where}: bias is {bias!r}; only plain LoRA, B times A, is supported, and the trained biases would be "
            f"lost. Merge that adapter with the tool that made it"
        )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"{where}: init_lora_weights is {start!r}, which changed the base's own weights when training began; the "
            f"adapter does not fit the base as it was published. Convert it first (PEFT: path_initial_model_for_weight_"
            f"conversion)"
        )


def check_numbers(config: Mapping[str, Any], where: Path) -> None:
    """Raise unless ranks and scales are numbers."""
    for key, kind in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        patterns = config.get(kind) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{where}: {kind} is {patterns!r}; it must be an object of numbers by pattern")
        by_pattern = {f"{kind}[{pattern!r}]": value for pattern, value in patterns.items()}
        for name, value in {key: config.get(key), **by_pattern}.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or (key == "r" and (value < 1 or value != int(value))):
                allowed = "a whole number of at least 1" if key == "r" else "a finite number"
                raise ValueError(
                    f"{where}: {name} is {value!r}; it must be {allowed}. The adapter's config belongs to another "
                    f"file, or is damaged: get it again"
                )


def rank_and_scale(config: Mapping[str, Any], key: str) -> tuple[int, float]:
    """Return the rank and scale that PEFT gives a module, or a parameter, of this full path."""
    r = int(_by_pattern(config.get("rank_pattern") or {}, key, config["r"]))
    alpha = float(_by_pattern(config.get("alpha_pattern") or {}, key, config["lora_alpha"]))
    return r, alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def only_stack(config: Mapping[str, Any]) -> str | None:
    """Return gate_up_proj or down_proj if a config's target_parameters name only one of the two, else None."""
    targets = config.get("target_parameters") or []
    stacks = {stack for stack in ("gate_up_proj", "down_proj") if any(str(name).endswith(stack) for name in targets)}
    return stacks.pop() if len(stacks) == 1 else None


def packed_module(stack: str) -> str:
    """Return the module that holds the factors of an expert stack; PEFT wraps gate_up_proj first."""
    experts, _, kind = stack.rpartition(".")
    return experts if kind == "down_proj" else f"{experts}.base_layer"


def packed_stack(module: str) -> str:
    """Return the expert stack whose factors a module holds, given that both stacks of its layer are adapted."""
    inner = module.removesuffix(".base_layer")
    return f"{inner}.{'down_proj' if inner == module else 'gate_up_proj'}"


def turns_parameters(config: Mapping[str, Any]) -> bool | None:
    """Return whether the config's version of PEFT reads [E, out, in] correctly (0.19.1 and newer); None if unknown."""
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    return None if version is None else tuple(map(int, version.groups())) >= (0, 19, 1)


def _by_pattern(patterns: Mapping[str, Any], key: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return default
