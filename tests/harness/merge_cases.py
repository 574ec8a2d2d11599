"""Inputs and references for the tests of merging: adapters by stock PEFT, and raw files read with numpy alone."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
Arrays = dict[str, Any]


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()


def adapt(base: Path, out: Path, *, size: float = 0.05, dense: bool = False, full: bool = False, r: int = 4) -> Any:
    """Let stock PEFT save an adapter of this base with random factors; return PEFT's model."""
    config = LoraConfig(
        r=r,
        lora_alpha=6,
        target_modules=["q_proj", "o_proj", *(["up_proj"] if dense else []), "qkv"],
        target_parameters=None if dense else STACKS,
        modules_to_save=["merger.norm"] if full else None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(stock(base), config)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=size)
        elif "modules_to_save" in name:
            parameter.data.normal_()
    model.save_pretrained(out)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 45).view(2, 20), use_cache=False).logits


def raw(folder: Path) -> Arrays:
    """Read all tensors of a folder's weight files as float32 with numpy; the bits of bfloat16 are under NAME.bits."""
    arrays: Arrays = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            part = data[start + first : start + last]
            if entry["dtype"] == "BF16":
                bits = np.frombuffer(part, "<u2").reshape(entry["shape"])
                arrays[f"{name}.bits"] = bits
                arrays[name] = (bits.astype(np.uint32) << 16).view(np.float32)
            else:
                arrays[name] = np.frombuffer(part, "<f4").reshape(entry["shape"])
            assert arrays[name].size == math.prod(entry["shape"])
    return arrays


def rounded(values: Any) -> Any:
    """Round float32 to the bits of bfloat16: to the nearest value, with ties to even."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def expected(base: Arrays, adapter: Arrays, *, scale: float, experts: int) -> Arrays:
    """Compute base plus adapter in the hub's layout, in float64; `base` has its experts in the hub's layout."""
    sums = {name: values.astype(np.float64) for name, values in base.items() if not name.endswith(".bits")}
    prefix = "base_model.model."
    for name, a in adapter.items():
        if name.endswith(".bits") or ".lora_B." in name:
            continue
        if ".lora_A." not in name:
            sums[name.removeprefix(prefix)] = a.astype(np.float64)
            continue
        b = adapter[name.replace(".lora_A.", ".lora_B.")].astype(np.float64)
        module = name.removeprefix(prefix).removesuffix(".lora_A.weight")
        if not module.endswith((".mlp.experts", ".mlp.experts.base_layer")):
            sums[f"{module}.weight"] += scale * b @ a
            continue
        stack = "gate_up_proj" if module.endswith("base_layer") else "down_proj"
        r = len(a) // experts
        for e in range(experts):
            change = scale * b[:, e::experts] @ a[e * r : (e + 1) * r]
            sums[f"{module.removesuffix('.base_layer')}.{stack}"][e] += change.T
    return sums
