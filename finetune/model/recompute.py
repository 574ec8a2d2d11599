"""What waits for backward, in host memory: the inputs of the decoder layers under recompute.

Such a layer keeps its input and little else, and over a long row the inputs of all layers together are what fills the
device. Here they go to the host in forward, and come back when the layer's turn comes; what a layer keeps besides goes
the same way (`moe.recompute.contexts`).
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
    """Let the operations inside keep values of so many bytes and more in host memory; None: all stay.

    What a layer under recompute saves itself is not seen here, only its inputs. Weights stay where they are.
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
    """Recompute every decoder layer, and vision block that trains, in `layer` or `selective`; none in `none`.

    What layers keep, from `host_from_bytes` on, waits in host memory; None: on the device. Non-reentrant: hooks run
    once a pass, and a layer whose input needs no gradient still trains.
    """
    if mode == "auto" or mode not in ("none", *KEPT):
        raise ValueError(f"parallel.recompute: {mode!r} is not one of none, {', '.join(KEPT)}")
    deepep = [m.name for m in model.modules() if getattr(getattr(m, "options", None), "dispatch", None) == "deepep"]
    if mode == "selective" and deepep:
        raise ValueError(
            "parallel.recompute: selective keeps what the all-to-all brought, but moe.dispatch: deepep exchanges in "
            "buffers that cannot be kept. Use parallel.recompute: layer, or moe.dispatch: all_to_all"
        )
    if mode == "none":
        model.activation_checkpointing_disable()
        return
    run = partial(checkpointed, context_fn=contexts(mode, host_from_bytes=host_from_bytes), draws=draws(model))
    # not by transformers' public switch: it makes the embeddings require a gradient, for reentrant checkpoints, and
    # below a frozen base that is a backward through the first layer for nothing
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=run)
    tower = getattr(getattr(model, "model", None), "visual", None)
    if tower is not None and not any(p.requires_grad for p in tower.parameters()):
        for block in tower.modules():
            if hasattr(block, "gradient_checkpointing"):
                block.gradient_checkpointing = False  # a frozen tower keeps nothing that could be recomputed


def draws(model: nn.Module) -> bool:
    """Say whether the model draws random numbers while it trains, which a second pass must draw again."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0)
        or getattr(module, "attention_dropout", 0.0) > 0
        or (isinstance(module, GroupedExperts) and module.lora is not None and module.lora.dropout > 0)
        for module in model.modules()
    )
