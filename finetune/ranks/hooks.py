"""ZeRO-3's hooks: only modules with fetched parameters have them, and kept parameters are complete at every forward.

A parameter is *kept* (small: complete on every rank from one update to the next) or *fetched* (complete while its
module runs). The engine puts four hooks on every module, two of which add a node to the graph. With resident weights,
a layer would run some fifty of them for nothing.
"""

from collections.abc import Sequence
from typing import Any

import deepspeed
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from torch import nn

WAITING = 16_000_000
"""Elements of gradients that may wait to be averaged together: 32 MB in bfloat16."""


def settle_hooks(engine: Any, always: Sequence[nn.Parameter]) -> None:
    """Remove the hooks that fetch nothing, and gather the kept parameters; every rank must call this once.

    `always` are the parameters that train in every stage. The hooks stay around fetched parameters that do not: by
    them, a recompute finds out when to release these.
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
    _watch_fetched(engine)
    _average_by_group(engine.optimizer)
    keep_whole(engine)


def only_root_runs(root: nn.Module, *_: Any) -> None:
    """Remove everything else from the engine's stack of running modules, which all engines of a process share.

    A checkpoint ends its second pass by raising through the forward, so the modules that were running stay on the
    stack. If a parameter is then read outside its module, the engine takes it for a parameter of theirs.
    """
    FWD_MODULE_STACK[:] = [root]


def _watch_fetched(engine: Any) -> None:
    """Tell only the owners of fetched parameters when a forward begins and ends; the engine tells every module.

    By this they notice that a parameter is read outside its module. A timer is left out too, for which the engine would
    wait for the device at each forward. If the user asks for profiling, the engine's own hooks stay.
    """
    if engine.flops_profiler_enabled() or engine.random_ltd_enabled() or engine.memory_breakdown():
        return
    watched = [m._parameters for m in engine.module.modules() if any(not p.ds_persist for p in m.parameters(False))]

    def tell(is_running: bool) -> None:
        for parameters in watched:
            parameters._in_forward = is_running

    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    engine.module_forward_pre_hook = engine.module.register_forward_pre_hook(lambda *_: tell(True))
    engine.module_forward_post_hook = engine.module.register_forward_hook(lambda *_: tell(False))


def _average_by_group(optimizer: Any) -> None:
    """Collect the small gradients of experts before the engine averages them.

    The engine has one bucket for all gradients, and empties it whenever the next parameter is shared by other ranks.
    Where attention and experts train, that happens twice per layer.
    """
    average, end = (
        optimizer.reduce_independent_p_g_buckets_and_remove_grads,
        optimizer.independent_gradient_partition_epilogue,
    )
    waiting: list[Any] = []
    elements = 0

    def average_waiting() -> None:
        nonlocal elements
        for parameter in waiting:
            average(parameter)
        waiting.clear()
        elements = 0

    def average_later(parameter: Any) -> None:
        nonlocal elements
        if getattr(parameter, "allreduce", True) or parameter.ds_numel > WAITING:
            average(parameter)
            return
        if elements + parameter.ds_numel > WAITING:
            average_waiting()
        waiting.append(parameter)
        elements += parameter.ds_numel

    def average_rest() -> None:
        average_waiting()
        end()

    optimizer.reduce_independent_p_g_buckets_and_remove_grads = average_later
    optimizer.independent_gradient_partition_epilogue = average_rest


def keep_whole(engine: Any) -> None:
    """Gather the kept parameters that are partitioned; every rank must call this after anything that leaves them so.

    An applied update gathers them itself; hooks never do. A layer with a partitioned one would compute on an empty
    tensor, or the engine would record it as a parameter of the module that happens to run.
    """
    kept = engine.optimizer.persistent_parameters
    if kept:
        kept[0].all_gather(kept)


def forget_order(engine: Any) -> None:
    """Let the engine learn again in which order modules run; every rank must call this where another order begins.

    The engine would notice by itself, but in the middle of a forward or backward, and then fetch nothing ahead in the
    next one either.
    """
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
