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

WAITING = 16_000_000
"""Elements of gradients that may wait to be averaged together: 32 MB in bfloat16."""


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
    _watch_fetched(engine)
    _average_by_group(engine.optimizer)
    keep_whole(engine)


def only_root_runs(root: nn.Module, *_: Any) -> None:
    """Take everything else off the engine's stack of running modules, which is one for all engines of a process.

    A checkpoint ends its second pass by raising through the forward, and what was running stays on the stack for good:
    the engine would take a parameter that is read outside its module for one of theirs.
    """
    FWD_MODULE_STACK[:] = [root]


def _watch_fetched(engine: Any) -> None:
    """Tell only the owners of fetched parameters when a forward begins and ends, where the engine tells every module.

    They notice by it that one is read outside its module. Left out too is a timer for which the engine would wait for
    the device at each forward; what it does there on request stays its own.
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
    """Let the small gradients of experts wait for each other until the engine averages them.

    It has one bucket for all, and empties it whenever the ranks change that share a parameter: where attention and
    experts train, twice a layer.
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
    """Gather the kept parameters that are in pieces; every rank must call this after whatever leaves them so.

    An applied update gathers them itself, hooks never do. A layer that met one in pieces would compute on an empty
    tensor, or the engine would note it as a parameter of the module that happens to run.
    """
    kept = engine.optimizer.persistent_parameters
    if kept:
        kept[0].all_gather(kept)


def forget_order(engine: Any) -> None:
    """Let the engine trace again in which order modules run; every rank must call this where another order begins.

    It would notice by itself, in the middle of a forward or backward, and fetch nothing ahead for one more.
    """
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
