"""ZeRO-3's hooks: they hang only where something is fetched, and what no hook fetches is whole at every forward.

A parameter is *kept* (small: whole on every rank from one update to the next) or *fetched* (whole while its module
runs). The engine hangs four hooks on every module, two of which put a node into the graph; with resident weights a
layer would pay them some fifty times for nothing.
"""

from collections.abc import Sequence
from typing import Any

import deepspeed
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from torch import nn


def settle_hooks(engine: Any, always: Sequence[nn.Parameter]) -> None:
    """Leave the hooks on where they fetch, and make whole what is kept; every rank must call this once.

    `always` are the parameters that train in every stage. Around fetched ones that do not, the hooks stay: a recompute
    finds by them when to release these.
    """
    offload, trained = engine.optimizer.parameter_offload, {id(parameter) for parameter in always}
    needed = {
        id(hooks)
        for module in engine.module.modules()
        if any(p is not None and not p.ds_persist for p in module._parameters.values())
        or any(not p.ds_persist and id(p) not in trained for p in module.parameters())
        or deepspeed.utils.z3_leaf_module(module)
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
    }
    for handles in (offload.forward_hooks, offload.backward_hooks):
        for handle in handles:
            if id(handle.hooks_dict_ref()) not in needed:
                handle.remove()
        handles[:] = [handle for handle in handles if id(handle.hooks_dict_ref()) in needed]
    engine.module.register_forward_pre_hook(only_root_runs, prepend=True)
    keep_whole(engine)


def only_root_runs(root: nn.Module, *_: Any) -> None:
    """Take everything else off the engine's stack of running modules, which is one for all engines of a process.

    A checkpoint ends its second pass by raising through the forward, and what was running stays on the stack for good:
    the engine would take a parameter that is read outside its module for one of theirs.
    """
    FWD_MODULE_STACK[:] = [root]


def keep_whole(engine: Any) -> None:
    """Gather the kept parameters that are in pieces; every rank must call this after whatever leaves them so.

    An applied update gathers them itself, hooks never do. A layer that met one in pieces would compute on an empty
    tensor, or the engine would note it as a parameter of the module that happens to run.
    """
    kept = engine.optimizer.persistent_parameters
    if kept:
        kept[0].all_gather(kept)


def forget_order(engine: Any) -> None:
    """Let the engine learn anew in which order modules run; every rank must call this where another order begins.

    It would notice by itself, in the middle of a forward or backward, and fetch nothing ahead for one more.
    """
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
