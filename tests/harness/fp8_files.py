"""FP8 folders read and written with numpy alone: e4m3 by its definition, blocks by their indexes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

BLOCK = 128
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


def _value(code: int) -> float:
    exponent, mantissa = code // 8 % 16, code % 8
    if code % 128 == 127:
        return float("nan")
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if code >= 128 else size


VALUES = np.array([_value(code) for code in range(256)], dtype=np.float32)
_SIZES = VALUES[:127].astype(np.float64)


def encode(values: Any) -> Any:
    """Return the nearest codes of float32 values up to 448, with ties to the even code."""
    sizes = np.abs(values.astype(np.float64))
    above = np.clip(np.searchsorted(_SIZES, sizes), 1, 126)
    low, high = sizes - _SIZES[above - 1], _SIZES[above] - sizes
    even = np.where(above % 2 == 0, above, above - 1)
    codes = np.where(low < high, above - 1, np.where(low > high, above, even))
    return (codes + 128 * np.signbit(values)).astype(np.uint8)


def quantised(values: Any) -> tuple[Any, Any]:
    """Return codes and scales of a float32 tensor, whose last two dims are in blocks."""
    values = values.astype(np.float32)
    rows, columns = values.shape[-2:]
    codes = np.zeros(values.shape, np.uint8)
    scales = np.ones((*values.shape[:-2], -(-rows // BLOCK), -(-columns // BLOCK)), np.float32)
    for row in range(scales.shape[-2]):
        for column in range(scales.shape[-1]):
            place = (..., slice(BLOCK * row, BLOCK * row + BLOCK), slice(BLOCK * column, BLOCK * column + BLOCK))
            block = values[place]
            scale = np.abs(block).max(axis=(-1, -2)) / np.float32(448)
            scale = np.where(scale > 0, scale, np.float32(1))
            codes[place] = encode(block / scale[..., None, None])
            scales[..., row, column] = scale
    return codes, scales


def dequantised(codes: Any, scales: Any) -> Any:
    """Return float32 values: each code's value times the scale of its block."""
    rows, columns = (np.arange(size) // BLOCK for size in codes.shape[-2:])
    return VALUES[codes] * scales.astype(np.float32)[..., rows[:, None], columns]


def raw(folder: Path) -> dict[str, Any]:
    """Return the tensors of a folder's files: codes as uint8, all others as float32."""
    arrays: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            part = data[start + first : start + last]
            kinds = {"F8_E4M3": "u1", "BF16": "<u2", "F32": "<f4", "F16": "<f2"}
            array = np.frombuffer(part, kinds[entry["dtype"]]).reshape(entry["shape"])
            if entry["dtype"] == "BF16":
                array = (array.astype("<u4") << 16).view("<f4")
            arrays[name] = array if array.dtype == np.uint8 else array.astype(np.float32)
    return arrays


def weights(arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the float32 weights of `raw` tensors, by their keys in the files."""
    return {
        name: dequantised(array, arrays[f"{name}_scale_inv"]) if array.dtype == np.uint8 else array
        for name, array in arrays.items()
        if not name.endswith("_scale_inv")
    }


def changed(folder: Path, **tensors: Any) -> None:
    """Replace tensors in a folder's one weight file, by the safetensors library; None removes one."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    kept = {**load_file(file), **tensors}
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, file, metadata=metadata)


def quantise_folder(folder: Path, dequantised_to: Path) -> None:
    """Turn a folder with one weight file into an FP8 folder, and write another with its float32 weights."""
    arrays = raw(folder)
    made = {}
    for name, array in arrays.items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        if ".layers." in name and module in MODULES and array.ndim > 1:
            made[name], made[f"{name}_scale_inv"] = quantised(array)
    shutil.copytree(folder, dequantised_to)
    changed(
        dequantised_to,
        **{n: torch.from_numpy(dequantised(made[n], made[f"{n}_scale_inv"])) for n in made if n in arrays},
    )
    tensors = {name: torch.from_numpy(array) for name, array in made.items()}
    changed(folder, **{n: t.view(torch.float8_e4m3fn) if t.dtype == torch.uint8 else t for n, t in tensors.items()})
    config = json.loads((folder / "config.json").read_text())
    block = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
