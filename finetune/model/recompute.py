"""Recompute of the decoder layers, and host memory for the inputs that they keep until backward.

A layer under recompute keeps its input and little else, and with a long row the inputs of all layers together fill the
device. Here they move to the host in forward, and back for the layer's backward; other tensors that a layer keeps move
in the same way (`moe.recompute.contexts`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe.experts import GroupedExperts
from moe.host import HostCopy, to_host, worth_moving
from moe.recompute import KEPT, checkpointed, contexts


@contextmanager
def offloaded(least_bytes: int | None) -> Iterator[None]:
    """Let the operations inside keep tensors of at least `least_bytes` in host memory; None: all stay on the device.

    This covers the inputs of a layer under recompute, not the tensors it saves itself. Weights stay where they are.
    """
    if least_bytes is None:
        yield
        return

    def pack(tensor: Tensor) -> Any:
        stays = isinstance(tensor, nn.Parameter) or not worth_moving(tensor, least_bytes)
        return tensor if stays else to_host(tensor)

    def unpack(saved: Any) -> Tensor:
        return saved.back() if isinstance(saved, HostCopy) else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def set_recompute(
    model: Any, mode: Literal["none", "layer", "selective", "auto"], *, host_from_bytes: int | None = None
) -> None:
    """Recompute every decoder layer, and every vision block that trains, in mode `layer` or `selective`.

    Tensors of at least `host_from_bytes` that layers keep wait in host memory; None: on the device. The recompute is
    non-reentrant: hooks run once per pass, and a layer whose input needs no gradient still trains.
    """
    if mode == "auto" or mode not in ("none", *KEPT):
        raise ValueError(f"parallel.recompute must be one of none, {', '.join(KEPT)}, got {mode!r}")
    deepep = [m.name for m in model.modules() if getattr(getattr(m, "options", None), "dispatch", None) == "deepep"]
    if mode == "selective" and deepep:
        raise ValueError(
            "parallel.recompute: selective keeps the rows that the all-to-all received, but moe.dispatch: deepep "
            "receives them in buffers that cannot be kept. Use parallel.recompute: layer, or moe.dispatch: all_to_all"
        )
    if mode == "none":
        model.activation_checkpointing_disable()
        return
    run = partial(checkpointed, context_fn=contexts(mode, host_from_bytes=host_from_bytes), draws=draws(model))
    # not through transformers' public switch: for reentrant checkpoints it makes the embeddings require a gradient,
    # and with a frozen base that costs a useless backward through the first layer
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=run)
    tower = getattr(getattr(model, "model", None), "visual", None)
    if tower is not None and not any(p.requires_grad for p in tower.parameters()):
        for block in tower.modules():
            if hasattr(block, "gradient_checkpointing"):
                block.gradient_checkpointing = False  # a frozen tower keeps nothing that could be recomputed


def draws(model: nn.Module) -> bool:
    """Return whether the model draws random numbers in training, which a second pass must draw again."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0)
        or getattr(module, "attention_dropout", 0.0) > 0
        or (isinstance(module, GroupedExperts) and module.lora is not None and module.lora.dropout > 0)
        for module in model.modules()
    )
