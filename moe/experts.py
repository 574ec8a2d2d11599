"""The experts that one rank owns: frozen, adapted by LoRA, or fully trained; one grouped GEMM per projection."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moe.config import CHUNK_BYTES, KEEP_BYTES
from moe.grouped import grouped_experts
from moe.kernels.linear import Workspace
from moe.kernels.packed import Bits, Packing
from moe.projections import CallOptions
from moe.start_values import generator_of, uniform_factor

_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True, kw_only=True)
class ExpertLora:
    """Rank, strength and dropout of the experts' adapters; r is per expert."""

    r: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """The factor of the low-rank part: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.alpha / math.sqrt(self.r) if self.rslora else self.alpha / self.r


def lora_shapes(*, experts: int, hidden: int, intermediate: int, r: int) -> dict[str, tuple[int, int, int]]:
    """Return the shapes of the adapter tensors of `experts` experts; gate and up share one A, as in PEFT's layout."""
    return {
        "gate_up_lora_A": (experts, r, hidden),
        "gate_up_lora_B": (experts, 2 * intermediate, r),
        "down_lora_A": (experts, r, intermediate),
        "down_lora_B": (experts, hidden, r),
    }


def initial_lora(
    name: str, tensor: str, expert: int, shape: tuple[int, int], *, seed: int, b_std: float = 0.0
) -> Tensor:
    """Return the float32 start value of one expert's factor, which is the same on every rank of every layout.

    A is uniform in +-1/sqrt(in), as in PEFT. B is zero, or normal with b_std (for tests and benchmarks: with a zero
    B half of the gradients vanish).
    """
    if tensor.endswith("_B") and b_std == 0.0:
        return torch.zeros(shape)
    generator = generator_of(seed, f"{name}/{tensor}/{expert}")
    return (
        torch.randn(shape, generator=generator) * b_std if tensor.endswith("_B") else uniform_factor(shape, generator)
    )


class GroupedExperts(nn.Module):
    """The experts `local_experts` of a layer of `num_experts`, applied to rows sorted by local expert.

    Mode "frozen" trains nothing, "lora" the factors next to the frozen weights, "full" the weights. Frozen weights are
    buffers when `resident`, so that an engine that partitions parameters leaves them alone. With `bits` each frozen
    matrix is one row of bytes, and a call unpacks the layer's into the `workspace`, which layers may share. On the meta
    device only the shapes exist: fill the weights, then call init_lora.
    """

    gate_up: Tensor
    down: Tensor

    def __init__(
        self,
        *,
        name: str,
        num_experts: int,
        local_experts: range,
        hidden: int,
        intermediate: int,
        mode: Literal["frozen", "lora", "full"],
        lora: ExpertLora | None,
        resident: bool,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        bits: Bits | None = None,
        workspace: Workspace | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        super().__init__()
        _check(name, mode, lora, hidden, intermediate, dtype)
        if bits is not None and mode == "full":
            raise ValueError(f"{name}: mode is 'full' and bits={bits!r}: weights that train cannot be quantised")
        assert 0 <= local_experts.start < local_experts.stop <= num_experts
        self.name = name
        self.num_experts = num_experts
        self.local_experts = local_experts
        self.hidden, self.intermediate = hidden, intermediate
        self.mode = mode
        self.lora = lora
        self.resident = resident
        self.seed = seed
        self.is_adapted = True  # False leaves the factors out: the output of the base, for comparison
        row_bytes = (6 * intermediate + 2 * hidden) * dtype.itemsize
        self.chunk_rows = max(8, chunk_bytes // row_bytes // 8 * 8)
        self.keep_rows = keep_bytes // (2 * intermediate * dtype.itemsize)
        local = len(local_experts)
        self.workspace = workspace or Workspace()
        self.packings: dict[str, Packing] = {}
        for key, out, into in (("gate_up", 2 * intermediate, hidden), ("down", hidden, intermediate)):
            if bits is not None:
                self.packings[key] = Packing(bits=bits, out=out, into=into)
                weight = torch.empty((local, self.packings[key].row_bytes), dtype=torch.uint8, device=device)
            else:
                weight = torch.empty((local, out, into), dtype=dtype, device=device)
            if resident and mode != "full":
                self.register_buffer(key, weight)
            else:
                self.register_parameter(key, nn.Parameter(weight, requires_grad=mode == "full"))
        shapes = lora_shapes(experts=local, hidden=hidden, intermediate=intermediate, r=lora.r) if lora else {}
        for key, shape in shapes.items():
            self.register_parameter(key, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
        self._factors = tuple(shapes)
        self._roomy: dict[str, tuple[Tensor, Tensor]] = {}
        self.make_room()
        if not self.gate_up.is_meta:
            self.init_lora()

    @torch.no_grad()
    def make_room(self) -> None:
        """Give resident weights in mode "lora" room for the adapter (r more rows or columns), unless they have it.

        forward calls it too, so code that replaces a buffer need not. A loader that assigns buffers should call it
        after each: forward would copy layer by layer, and each freed block would be slightly too small for the next.
        """
        if self.lora is None or not self.resident or self.packings:
            return
        for key, dim in (("gate_up", 1), ("down", 2)):
            weight = self._buffers[key]
            assert weight is not None
            if key in self._roomy and self._roomy[key][1] is weight:
                continue
            shape = list(weight.shape)
            shape[dim] += self.lora.r
            wide = torch.empty(shape, dtype=weight.dtype, device=weight.device)
            view = wide.narrow(dim, 0, weight.shape[dim])
            if not weight.is_meta:
                view.copy_(weight)
            self._buffers[key] = view
            self._roomy[key] = (wide, view)

    @torch.no_grad()
    def init_lora(self, *, b_std: float = 0.0) -> None:
        """Fill the factors from (seed, name, global expert id), so that the adapter is the same at any ep."""
        for key in self._factors:
            factor = self.get_parameter(key)
            for local, expert in enumerate(self.local_experts):
                shape = (factor.shape[1], factor.shape[2])
                factor[local].copy_(initial_lora(self.name, key, expert, shape, seed=self.seed, b_std=b_std))

    def forward(self, x_RD: Tensor, counts_L: Tensor) -> Tensor:
        """Return y_RD for rows sorted by local expert; counts_L [L] holds the rows of each expert and sums to R."""
        assert counts_L.shape == (len(self.local_experts),)
        lora = self.lora if self.is_adapted else None
        dropout = lora.dropout if lora is not None and self.training else 0.0
        # dropout masks the x in front of A only, so A cannot share a GEMM with the frozen weight
        inside = lora is not None and (self.resident or bool(self.packings)) and not dropout
        if inside:
            self.make_room()
        options = CallOptions(
            scale=lora.scale / (1.0 - dropout) if lora is not None else 0.0,
            dropout=dropout,
            # drawn on the host from torch's own state, which activation checkpointing restores in its second pass
            dropout_seed=int(torch.randint(1 << 40, ())) if dropout else 0,
            inside=inside,
            chunk_rows=self.chunk_rows,
            keep_rows=self.keep_rows,
            two_f=2 * self.intermediate,
            packings=self.packings,
            workspace=self.workspace,
        )
        roomy = self._roomy if inside else {}
        gate_up, down = (roomy[key][0] if key in roomy else getattr(self, key) for key in ("gate_up", "down"))
        factors = tuple(getattr(self, key) for key in self._factors if lora is not None)
        if x_RD.is_cuda:
            named = {"gate_up": gate_up, "down": down, **dict(zip(self._factors, factors, strict=False))}
            check_aligned(self.name, named)
        return grouped_experts(x_RD, counts_L, gate_up, down, factors, options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GroupedExperts":
        """Move or cast like any module, and release the weights that this replaced."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not annotate it
        if any(self._buffers[key] is not view for key, (_, view) in self._roomy.items()):
            self._roomy.clear()
            self.make_room()
        return self

    def extra_repr(self) -> str:
        """Describe the experts and how they are trained."""
        ids = f"{self.local_experts.start}..{self.local_experts.stop - 1} of {self.num_experts}"
        return f"{self.name}, experts {ids}, mode={self.mode}, lora={self.lora}"


def _check(name: str, mode: str, lora: ExpertLora | None, hidden: int, intermediate: int, dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"{name}: experts compute in bfloat16 or float32, not {dtype}")
    if mode not in ("frozen", "lora", "full"):
        raise ValueError(f"{name}: mode must be one of frozen, lora, full, got {mode!r}")
    if (mode == "lora") != (lora is not None):
        raise ValueError(f"{name}: mode is {mode!r} and lora={lora}: give LoRA options in mode 'lora', and only there")
    unit = 16 // dtype.itemsize
    sizes = {"hidden size": hidden, "expert hidden size": intermediate} | ({"LoRA r": lora.r} if lora else {})
    for what, size in sizes.items():
        if size < 1 or size % unit:
            allowed = f"{unit}, {2 * unit}, {3 * unit}, ..."
            raise ValueError(
                f"{name}: {what} {size} cannot be used by the grouped GEMM in {_DTYPES[dtype]}: the length of a row "
                f"must be a multiple of 16 bytes, so use a multiple of {unit} ({allowed})"
            )
    if lora is not None and not 0.0 <= lora.dropout < 1.0:
        raise ValueError(f"{name}: LoRA dropout must be at least 0 and below 1, got {lora.dropout}")


def check_aligned(name: str, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless each tensor begins at a multiple of 16 bytes, as the grouped GEMM of a GPU requires."""
    for key, weight in weights.items():
        past = weight.data_ptr() & 15
        if past:
            raise ValueError(
                f"{name}: {key} {tuple(weight.shape)} begins {past} bytes past a multiple of 16, where the grouped "
                f"GEMM cannot read it. On a single rank the trainable parameters lie end to end, and the size of one "
                f"before this is not a multiple of {16 // weight.element_size()}: freeze its family, or use 2 ranks"
            )
