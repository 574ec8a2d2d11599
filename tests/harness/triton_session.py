"""The fused kernels without a GPU, as a script: `values` in Triton's interpreter, `compiled` for three architectures.

It is a process of its own, because the interpreter is chosen before the kernels are defined, and because Triton lies in
the folder of judges. It writes one JSON object.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe.kernels import fused
from moe.kernels.packed import BLOCK, FLOAT, SCALE_BLOCK, Packing

SHAPES = ((48, 64), (40, 24), (6, 2048), (96, 130), (3, 1100))
"""With rows that blocks divide and rows that they do not, and with fewer and more weights than one program takes."""
ARCHITECTURES = (80, 90, 100)


def values() -> dict[str, list[int]]:
    """Return for each case how many units in the last place the kernel is apart, and how much it wrote elsewhere."""
    torch.manual_seed(0)
    apart = {}
    for bits in ("int8", "nf4"):
        for out, into in SHAPES:
            packing = Packing(bits=bits, out=out, into=into)
            matrices = torch.randn(3, out, into) * torch.rand(3, out, 1)
            matrices[1, 0] = 0
            packed = packing.pack(matrices, name="w")
            for dtype, whole in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
                twin = packing.unpack(packed, torch.empty(3, out, into, dtype=dtype))
                place = torch.full((3, out + 2, into + 8), 7.0, dtype=dtype)
                fused.unpack(packing, packed, place[:, :out, :into])
                units = (place[:, :out, :into].contiguous().view(whole).long() - twin.view(whole).long()).abs().max()
                around = int((place[:, out:] != 7).sum()) + int((place[:, :, into:] != 7).sum())
                apart[f"{bits} {out}x{into} {dtype}"] = [int(units), around]
    return apart


def compiled() -> dict[str, list[object]]:
    """Return for each kernel and architecture its registers, its spilled bytes, and the kinds of its operations."""
    kernels = {}
    packing = Packing(bits="nf4", out=1536, into=2048)
    for arch in ARCHITECTURES:
        for out in ("*fp32", "*bf16"):
            for name, source in (("int8", _int8(out)), ("nf4", _nf4(packing, out))):
                kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False})
                text = kernel.asm["ptx"]
                kernels[f"{name} sm_{arch} {out}"] = [*_registers(text), "fma" in text, "cvt.rn.bf16" in text]
    return kernels


def _nf4(packing: Packing, out: str) -> ASTSource:
    begins = packing.begins
    types = {"bytes_ptr": "*u8"} | dict.fromkeys(("floats_ptr", "code_ptr", "scale_ptr"), "*fp32")
    types |= {"out_ptr": out, "row_bytes": "i32", "weights": "i32", "out_stride": "i64", "line_stride": "i32"}
    constants = {
        "INTO": packing.into,
        "SCALE_CODES": begins[1],
        "SCALES": begins[2] // FLOAT,
        "OFFSET": begins[3] // FLOAT,
        "BLOCK": BLOCK,
        "SCALE_BLOCK": SCALE_BLOCK,
        "BLOCKS": fused.BLOCKS,
    }
    return ASTSource(fused.nf4_kernel, types | dict.fromkeys(constants, "constexpr"), constants)


def _int8(out: str) -> ASTSource:
    types = {"codes_ptr": "*i8", "floats_ptr": "*fp32", "out_ptr": out}
    types |= {"row_bytes": "i32", "out_stride": "i64", "line_stride": "i32"}
    constants = {"INTO": 2048, "SCALES": 786432, "COLUMNS": fused.COLUMNS}
    return ASTSource(fused.int8_kernel, types | dict.fromkeys(constants, "constexpr"), constants)


def _registers(ptx: str) -> tuple[int, int]:
    """Assemble PTX by Triton's own assembler, which reports registers and spills."""
    arch = re.search(r"\.target (sm_\w+)", ptx)[1]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = tools / ("ptxas-blackwell" if arch >= "sm_100" and arch[3:6] == "100" else "ptxas")
    with TemporaryDirectory() as folder:
        (Path(folder) / "k.ptx").write_text(ptx)
        command = [tool, "-v", f"--gpu-name={arch}", "k.ptx", "-o", "k.cubin"]
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    return int(registers[1]), int(spilled[1])


if __name__ == "__main__":
    json.dump({"values": values, "compiled": compiled}[sys.argv[1]](), sys.stdout)
