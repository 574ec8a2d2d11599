"""The memory of a server, from the planner's formulas: over how many GPUs a model is spread, and what then fits.

Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from finetune.architecture.shapes import parameter_shapes
from finetune.config import AdaptersConfig, DensePartConfig
from finetune.planner.activations import Rows, layer
from finetune.planner.gpus import Gpu, gpu
from finetune.planner.memory import RESERVE_BYTES, RESERVE_SHARE
from finetune.planner.vision import tower
from finetune.serving.commands import Served, ServerName

SHARE = 0.9
"""Share of a GPU's memory that a server may use, which is also vLLM's default."""
CHUNK = 8192
"""Tokens of a prompt that servers compute at a time."""
_FROZEN = AdaptersConfig(attention=DensePartConfig())
_WIDE = 4
_USUAL = 2


@dataclass(frozen=True, kw_only=True)
class ServerMemory:
    """Bytes of the fullest GPU, by purpose; `conversation` is one of the full length."""

    gpu: Gpu | None
    gpus: int
    length: int
    weights: int
    adapter: int
    at_work: int
    """One forward pass: of the decoder over a part of a prompt, or of the tower over the largest image."""
    reserve: int
    conversation: int

    @property
    def conversations(self) -> int:
        """Return how many conversations of the full length fit at a time; shorter ones fit in proportion."""
        assert self.gpu is not None
        free = int(SHARE * self.gpu.memory_bytes) - self.weights - self.adapter - self.at_work - self.reserve
        return max(0, free // self.conversation)

    def suits(self, server: ServerName) -> bool:
        """Say whether a server can spread the model so: our endpoint over transformers uses one GPU."""
        return self.gpus == 1 or server != "transformers"

    def flags(self, server: ServerName) -> list[str]:
        """Return the words of the server's command that follow from the memory."""
        if self.gpu is None or server == "transformers":
            return []
        spread = [{"vllm": "--tensor-parallel-size", "sglang": "--tp"}[server], str(self.gpus)] if self.gpus > 1 else []
        if server == "vllm":
            return [*spread, "--gpu-memory-utilization", str(SHARE)]
        static = SHARE - (self.at_work + self.reserve) / self.gpu.memory_bytes  # sglang's share excludes these two
        return [*spread, "--mem-fraction-static", f"{static:.2f}"]

    def lines(self) -> Iterator[str]:
        """Yield the plan for people."""
        where = "one GPU" if self.gpu is None else f"each of {self.gpus} x {self.gpu.name}"
        yield f"memory of {where}"
        rows = {"weights": self.weights, "adapter": self.adapter, "one forward pass": self.at_work}
        rows |= {"reserve": self.reserve, f"one conversation of {self.length:,} tokens": self.conversation}
        for name, size in rows.items():
            if size:
                yield f"  {name:<40}{_readable(size)}"
        if self.gpu is None:
            yield "  --gpu KIND plans over how many GPUs to spread it, and how many conversations fit"
        else:
            room = _readable(int(SHARE * self.gpu.memory_bytes))
            yield f"  {'of its memory, a server may use':<40}{room}: {self.conversations:,} conversations at a time"


def _readable(size: int) -> str:
    return f"{size / 1e9:>9.2f} GB" if size >= 1e8 else f"{size / 1e6:>9.2f} MB"


def server_memory(served: Served, *, kind: str = "", length: int | None = None, dtype: str = "auto") -> ServerMemory:
    """Return the plan on the fewest GPUs that hold the model and one conversation of the full length.

    Without a kind of GPU, all is counted on one.
    """
    if not kind:
        return _memory(served, None, 1, length, dtype)
    text = served.family.text
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if not text.num_attention_heads % count]
    plans = [_memory(served, gpu(kind), count, length, dtype) for count in counts]
    for plan in plans:
        if plan.conversations:
            return plan
    raise ValueError(
        f"--gpu {kind}: even {counts[-1]} of them, the most among which its {text.num_attention_heads} attention heads "
        f"can be divided, cannot hold the model and one conversation of {plans[-1].length:,} tokens. Take a larger "
        f"kind, or a shorter context (--length)"
    )


def _memory(served: Served, kind: Gpu | None, gpus: int, length: int | None, dtype: str) -> ServerMemory:
    text, itemsize = served.family.text, _WIDE if dtype == "float32" else _USUAL
    length = length or served.length
    heads = -(-text.num_key_value_heads // gpus)  # with more GPUs than heads, several keep a copy of one
    at_work = int(_forward(served, itemsize))
    weights, adapter = _weight_bytes(served, itemsize) // gpus, _adapter_bytes(served) // gpus
    return ServerMemory(
        gpu=kind,
        gpus=gpus,
        length=length,
        weights=weights,
        adapter=adapter,
        at_work=at_work,
        reserve=int(RESERVE_BYTES + RESERVE_SHARE * (weights + adapter + at_work)) if kind else 0,
        conversation=itemsize * 2 * text.num_hidden_layers * heads * text.head_dim * length,
    )


def _forward(served: Served, itemsize: int) -> float:
    """Return the bytes of the larger pass: one decoder layer over a chunk, or the tower over the largest image."""
    family, text = served.family, served.family.text
    patch = family.vision.patch_size**2
    patches = served.rules().image_pixels[1] // patch
    each = text.experts.num_experts_per_tok if text.experts else 1
    rows = Rows(tokens=CHUNK, supervised=1, patches=patches, arriving=CHUNK * each, itemsize=itemsize)
    decoder = layer(family, _FROZEN, rows, "layer", sparse=family.is_moe, ep=1).passing
    return max(decoder, tower(family, _FROZEN, rows, "layer").forward)


def _weight_bytes(served: Served, itemsize: int) -> int:
    """Return the bytes of the weights as a server holds them; narrower files, such as those in 8 bits, stay narrow."""
    wide = itemsize * sum(prod(shape) for shape in parameter_shapes(served.family).values())
    files = sum(file.stat().st_size for file in served.model.glob("*.safetensors"))
    return min(wide, files) if files and itemsize == _USUAL else wide


def _adapter_bytes(served: Served) -> int:
    """Return the bytes of the adapter's factors, which servers keep beside the weights."""
    if served.adapter is None:
        return 0
    return sum(file.stat().st_size for file in served.adapter.folder.glob("*.safetensors"))
