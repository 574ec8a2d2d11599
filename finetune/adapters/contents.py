"""The contents of an adapter file and its PEFT config for a model, by part and in canonical names."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from peft import LoraConfig
from torch import Tensor, nn

from finetune.architecture.parts import PARTS
from finetune.architecture.shapes import Shape, part_of
from finetune.model.empty import EmptyModel
from finetune.model.lora import adapted_part, lora_targets, peft_config, sparse_lora
from moe.experts import ExpertLora as Lora
from moe.experts import GroupedExperts
from moe.names import PEFT_PREFIX

_SPARSE = ("experts", "router")
_FILE_WORDS = {"embeddings": "embed_tokens", "head": "lm_head"}
"""The names of two parts in the metadata of adapter files, which predate the current ones."""
_NO_MODULES = "dummy-target-modules"
"""PEFT's placeholder for the targets of an adapter that has full modules only."""


@dataclass(frozen=True, kw_only=True)
class TrainedTensor:
    """A trainable tensor: its canonical name, the module that owns it, and its shape in the file."""

    name: str
    parameter: Tensor
    owner: nn.Module
    shape: Shape

    @property
    def is_packed(self) -> bool:
        """Return whether the file stores the factors of all experts side by side in one 2-D tensor."""
        return isinstance(self.owner, GroupedExperts) and ".lora_" in self.name

    @property
    def experts(self) -> int:
        """Number of experts in a stack; 1 for a dense tensor, which comes in one piece."""
        return self.owner.num_experts if isinstance(self.owner, GroupedExperts) else 1

    @property
    def file_name(self) -> str:
        """The tensor's name in PEFT's file, where full tensors have the prefix too."""
        return self.name if self.name.startswith(PEFT_PREFIX) else PEFT_PREFIX + self.name


def lora_by_part(empty: EmptyModel) -> dict[str, Lora | None]:
    """Return the trainable parts of a model with their LoRA options, or None for a part trained in full."""
    lora = {**empty.lora, **sparse_lora(empty.module)}
    parts = dict.fromkeys(adapted_part(empty.canonical(name)) for name in empty.trained)
    return {part: lora.get(part) for part in PARTS if part in parts}


def families_text(parts: Mapping[str, Lora | None]) -> str:
    """Return the metadata that records how each part was trained."""
    return json.dumps({_FILE_WORDS.get(part, part): asdict(lora) if lora else {} for part, lora in parts.items()})


def read_families(text: str) -> dict[str, Lora | None]:
    """Parse the text of `families_text`: the trained parts with their LoRA options, or None for full training."""
    parts = {word: part for part, word in _FILE_WORDS.items()}
    try:
        families = {parts.get(word, word): values for word, values in json.loads(text).items()}
        lora = {part: Lora(**values) if values else None for part, values in families.items()}
        if not lora.keys() <= set(PARTS) or not all(each is None or _is_sound(each) for each in lora.values()):
            raise ValueError("unknown part, or a value out of range")
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"the adapter's metadata moetune.families is {text[:80]!r}, not what moetune writes ({error}). Another "
            f"program changed it, or the file is damaged: get the adapter again"
        ) from error
    return lora


def _is_sound(lora: Lora) -> bool:
    """Return whether all values, which come from a file, have the right type and range."""
    numbers = (lora.r, lora.alpha, lora.dropout)
    plain = all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers)
    return plain and lora.r >= 1 and lora.r == int(lora.r) and isinstance(lora.rslora, bool)


def file_config(empty: EmptyModel, base: str) -> LoraConfig:
    """Return PEFT's config for all trainable tensors; targets are full paths in the model's own names."""
    trained = lora_by_part(empty)
    lora = {part: options for part, options in trained.items() if options is not None}
    names: dict[str, list[str]] = {part: [] for part in trained}
    for name in empty.expected:
        names.get(part_of(name), []).append(name)
    targets = {part: lora_targets(empty.expected.items(), part) for part in lora if part not in _SPARSE}
    bare = {part: names[part] for part in _SPARSE if part in lora}
    config = peft_config(targets, lora, parameters=bare) if lora else LoraConfig(target_modules=_NO_MODULES)
    full = [name.rpartition(".")[0] for part in trained if part not in lora for name in names[part]]
    config.modules_to_save = list(dict.fromkeys(full)) or None
    config.base_model_name_or_path, config.inference_mode = base, True
    return config


def trained_tensors(empty: EmptyModel) -> Iterator[TrainedTensor]:
    """Yield the trainable tensors, in the model's order."""
    for name in empty.trained:
        parameter, owner = empty.module.get_parameter(name), empty.module.get_submodule(name.rpartition(".")[0])
        canonical = empty.canonical(name)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if isinstance(owner, GroupedExperts):
            experts = owner.num_experts
            if canonical.endswith(".lora_A.weight"):
                shape = (experts * shape[1], shape[2])
            elif canonical.endswith(".lora_B.weight"):
                shape = (shape[1], shape[2] * experts)
            else:
                shape = (experts, *shape[1:])
        yield TrainedTensor(name=canonical, parameter=parameter, owner=owner, shape=shape)


def mode_text(lora: Lora | None, trains: bool) -> str:
    """Describe how a part of the model is trained."""
    if lora is None:
        return "full" if trains else "frozen"
    return f"lora of r {lora.r}, scale {lora.scale:g}"
