"""Compare losses and all gradients of micro-batches on the device with the CPU, by recompute mode and attention."""

import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.material import TINY, conversation, film, packed, photographs, renderer, sample
from benchmarks.gpu.sizes import Sizes
from benchmarks.harness.figure import Figure, at_most
from benchmarks.harness.outputs import same_tensors
from benchmarks.harness.spawned import on_ranks
from data.render.sample import Renderer, Sample
from data.render.vision import read_spec
from data.stream.batch import Batch, loss_sums
from finetune.config import RunConfig
from finetune.files.basefiles import open_base
from finetune.files.hubconfig import read_family
from finetune.files.tiny import write_tiny
from finetune.model.build import build
from finetune.model.forward import PackedModel
from finetune.model.weights import load_weights
from finetune.ranks.engine import engine_device, start_distributed
from finetune.settings.recipes import load_recipe
from finetune.training.setup import make_balance, model_options, save_memory

# every vision part trains, so that the backward passes of the tower and of DeepStack are covered
WORDS = (
    "adapters.attention.mode=lora",
    "adapters.experts.mode=lora",
    "adapters.router.mode=full",
    "adapters.vision_blocks.mode=lora",
    "adapters.merger.mode=full",
    "adapters.deepstack_mergers.mode=full",
    "moe.balance=micro",
)


@dataclass(frozen=True, kw_only=True)
class Way:
    """Options for the device, and the allowed error relative to each tensor's largest value.

    With `together`, all gradients are compared as one vector by its norm: in bfloat16, a token or two may go to other
    experts, which changes the gradients of these experts completely.
    """

    words: tuple[str, ...]
    losses: float = 2e-3
    gradients: float = 2e-3
    together: bool = False


def ways() -> dict[str, Way]:
    """Return the ways by name: nearly exact in float32, and with the kernels of training in bfloat16."""
    every_way = {
        f"float32, recompute {mode}": Way(
            words=("model.dtype=float32", "model.attention=segments", f"parallel.recompute={mode}")
        )
        for mode in ("none", "layer", "selective")
    }
    offload = ("model.dtype=float32", "parallel.recompute=layer", "parallel.offload_activations=true")
    every_way["float32, offload and tiles"] = Way(words=(*offload, "parallel.tile_tokens=64"))
    for mode in ("layer", "selective"):
        words = ("model.dtype=bfloat16", "model.attention=auto", f"parallel.recompute={mode}")
        every_way[f"bfloat16, recompute {mode}"] = Way(words=words, losses=2e-2, gradients=0.3, together=True)
    return every_way


def run(sizes: Sizes) -> Iterator[Figure]:
    """Yield each way's largest error over rows of text, images and video, and a row without samples."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        write_tiny(base, TINY)
        exactly = Way(words=("model.dtype=float32", "parallel.recompute=none"))
        (on_cpu,) = on_ranks(1, _all, base, {"": exactly})
        (on_device,) = on_ranks(1, _all, base, ways(), accelerator=sizes.device)
    for name, way in ways().items():
        sides = [
            {"losses": _only(side, SAMPLED), "gradients": _only(side, side.keys() - set(SAMPLED))}
            for side in (on_device[name], on_cpu[""])
        ]
        for what, allowed in (("losses", way.losses), ("gradients", way.gradients)):
            errors = _errors(*(side[what] for side in sides), together=way.together and what == "gradients")
            worst = max(errors, key=lambda key: errors[key])
            yield Figure(
                f"{sizes.device} against the CPU, {name}: largest error of {len(sides[0][what])} {what}",
                errors[worst],
                "of the largest value",
                config={"words": [*WORDS, *way.words], "worst": worst, "rows": list(ROWS), "together": way.together},
                target=at_most(allowed),
            )


def _only(tensors: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name in names}


def _errors(tensors: dict[str, Tensor], reference: dict[str, Tensor], *, together: bool) -> dict[str, float]:
    """Return the errors without raising on large ones: the figure reports them, and later figures still run."""
    errors = same_tensors(tensors, reference, relative=inf)
    if not together:
        return errors
    vector, right = (torch.cat([side[name].flatten() for name in reference]) for side in (tensors, reference))
    return {"all together": float((vector - right).norm() / right.norm())}


def _all(base: Path, chosen: dict[str, Way]) -> dict[str, dict[str, Tensor]]:
    start_distributed()
    torch.backends.cudnn.allow_tf32 = False  # for the patch embedding, if it is a convolution
    rows = _rows(renderer(base, max_tokens=16))
    return {name: _step(base, rows, [*WORDS, f"model.path={base}", *way.words]) for name, way in chosen.items()}


ROWS = {
    "text": (("text", 0, 0), ("text", 0, 0)),
    "image and text": (("image", 1, 0), ("text", 0, 0), ("two images", 2, 0)),
    "video": (("video", 0, 6),),
    "all": (("video", 0, 6), ("two images", 2, 0), ("text", 0, 0)),
    "nothing": (),
}
"""The samples of each row: name, number of images, frames of a video."""
SAMPLED = tuple(name for name, samples in ROWS.items() if samples)


def _rows(made: Renderer) -> dict[str, Batch]:
    return {
        name: packed(made, [_sample(made, name, at, *about) for at, about in enumerate(samples)], multiple=4)
        for name, samples in ROWS.items()
    }


def _sample(made: Renderer, row: str, at: int, what: str, images: int, frames: int) -> Sample:
    turns = conversation(f"What is {at}?", f"It is {what}.", images=images, frames=frames)
    return sample(made, f"{row}/{at}", turns, images=photographs()[:images], film=film()[:frames])


def _step(base: Path, rows: dict[str, Batch], words: list[str]) -> dict[str, Tensor]:
    """Return the loss of each row, and the gradients summed over the rows."""
    config: RunConfig = load_recipe("", words)[0]
    device = engine_device()
    family = read_family(base)
    balance = make_balance(config, family, device)
    assert balance is not None
    empty = build(base, model_options(config, family, device, print), balance=balance)
    load_weights(empty, open_base(base, empty.expected))
    _fill_factors(empty.module)
    model = PackedModel(empty.module, spec=read_spec(base))
    save_memory(model, config)
    model.train()
    results: dict[str, Any] = {}
    balance.start_step(sum(int((row.sample_ids >= 0).sum()) for row in rows.values()))
    for name, row in rows.items():
        there = model.send(row, device).arrived()
        balance.start_micro_batch(there.valid_T)
        losses = model(batch=there)
        (losses.objective / max(loss_sums(row).tokens, 1.0)).backward()
        if row.keys:
            results[name] = losses.objective
    results |= {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {name: tensor.detach().float().cpu() for name, tensor in results.items()}


@torch.no_grad()
def _fill_factors(module: torch.nn.Module) -> None:
    """Draw the factors B, since zeros would hide A's gradients; on the CPU, so that they are equal everywhere."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
