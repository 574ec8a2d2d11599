"""The engine: DeepSpeed ZeRO-3, from typed options, and the one rule by which losses are scaled.

Scale contract: every loss term hands `local_sum * world / N_step` to `backward`; the engine averages over the ranks and
nothing divides by the accumulation count, so N_step alone decides. A gradient injected in backward obeys the same rule.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from finetune.ranks.collectives import (
    PATIENCE,
    be_patient,
    has_group,
    join_restarted,
    parameter_table,
    require_equal_tables,
)
from finetune.ranks.engine_sizes import LEAST_PREFETCH, PERSISTENCE, PREFETCHED_LAYERS, bucket_elements
from finetune.ranks.hooks import keep_whole, only_root_runs, settle_hooks

_TRACKED = "metrics are tracked by track.* in the run's folder"
LIMITS = {
    "zero_optimization.stage": "the engine is ZeRO-3 in every case",
    "zero_optimization.zero_quantized_gradients": "expert parallelism cannot use quantized gradients",
    "zero_optimization.zero_quantized_weights": "expert parallelism cannot use quantized weights",
    "zero_optimization.zero_hpz_partition_size": "expert parallelism cannot use hpZeRO's secondary partitions",
    "zero_optimization.mics_shard_size": "expert parallelism cannot use MiCS",
    "zero_optimization.offload_optimizer": "checkpoints hold the device's optimizer slices, not offloaded ones",
    "zero_optimization.offload_param": "checkpoints hold the device's parameter slices, not offloaded ones",
    "expert_parallel": "the experts are placed by parallel.ep, before the engine starts",
    "tensor_parallel": "expert parallelism cannot be combined with the engine's tensor parallelism",
    "sequence_parallel_size": "sequence parallelism is parallel.sp, which the engine must not know",
    "pipeline": "there is no pipeline parallelism here",
    "fp16": "train in bfloat16 or float32: there is no loss scaling here",
    "optimizer": "the optimizer is made from optimizer.*",
    "scheduler": "the learning rate is set by the training loop",
    "csv_monitor": f"{_TRACKED}, and this one writes outside of it",
    "tensorboard": f"{_TRACKED}: set track.tensorboard",
    "wandb": f"{_TRACKED}: set track.wandb",
    "comet": _TRACKED,
    "flops_profiler.output_file": f"{_TRACKED}, and this file may lie outside of it",
    "autotuning": "the engine would start runs of its own, and write outside of the run's folder",
    "compile": "the layers exchange rows between ranks and cannot be compiled by the engine",
}
"""The keys that `engine.extra` may not set, and the reasons."""


class NotFinite(RuntimeError):
    """A step whose loss or gradient is not finite, on every rank alike; the weights are those of the step before."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Settings that decide a step; `extra` may add keys to the DeepSpeed config, but never change one of these."""

    micro_batches_per_step: int = 1
    clip_norm: float = 1.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    persistence_threshold: int = PERSISTENCE
    """Smaller parameters are gathered once per step, not once per micro-batch."""
    prefetch_elements: int | None = None
    """How far ahead partitioned weights are fetched; None: beyond the largest layer, as the engine's default is not."""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that share their learning rates: the highest in each stage, 0 in one that does not train them."""

    parameters: Sequence[nn.Parameter]
    peaks: Sequence[float]


def engine_config(options: EngineOptions, *, largest_layer: int = 0, trained: int = 0) -> dict[str, Any]:
    """Return the DeepSpeed dict; `largest_layer` and `trained` are the partitioned and trained elements of a rank."""
    ahead = options.prefetch_elements
    if ahead is None:
        ahead = max(LEAST_PREFETCH, int(PREFETCHED_LAYERS * largest_layer))
    ours = {
        "train_micro_batch_size_per_gpu": 1,  # a micro-batch is one packed row
        "gradient_accumulation_steps": options.micro_batches_per_step,
        "gradient_clipping": options.clip_norm,
        "bf16": {"enabled": options.dtype == "bfloat16"},
        # or gradients of a bfloat16 model are added up and reduced in bfloat16
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": options.persistence_threshold,
            "stage3_prefetch_bucket_size": ahead,
            "stage3_max_live_parameters": max(1_000_000_000, 4 * largest_layer),
            "reduce_bucket_size": bucket_elements(trained),
        },
        "steps_per_print": 1 << 31,
        "wall_clock_breakdown": False,
    }
    refused = [f"engine.extra.{key}: {why}" for key, why in LIMITS.items() if _has(options.extra, key)]
    shared = (f"engine.extra.{key}" for key in _shared(ours, options.extra))
    taken = [
        f"{key}: is made from typed options and cannot be overridden" for key in shared if key not in "".join(refused)
    ]
    if refused or taken:
        raise ValueError("\n".join([*refused, *taken]))
    return _merged(ours, options.extra)


def initialize(module: nn.Module, options: EngineOptions, groups: Sequence[Group] | None = None) -> Any:
    """Start the engine on `module` and return it; every rank must call this with the same parameters.

    `groups` hold every parameter that trains, each once; None: all of them at options.lr.
    The ranks compare names, shapes and dtypes first: a difference is a ValueError on all of them, not a hang.
    """
    _check(module, options)
    start_distributed()
    device = engine_device()
    require_equal_tables("Parameters and buffers", parameter_table(module), device)
    trained = [p for p in module.parameters() if p.requires_grad]
    config = engine_config(
        options, largest_layer=_largest_layer(module), trained=sum(getattr(p, "ds_numel", p.numel()) for p in trained)
    )
    # torch's fused AdamW, on the float32 masters: one kernel a group on CPU and CUDA, nothing compiled at start
    groups = [Group(parameters=trained, peaks=(options.lr,))] if groups is None else groups
    assert {id(p) for group in groups for p in group.parameters} == {id(p) for p in trained}
    made = [made for group in groups for made in _decay_groups(group, options.weight_decay)]
    optimizer = torch.optim.AdamW(made, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    settle_hooks(engine, [p for group in groups if all(group.peaks) for p in group.parameters])
    return engine


def take_device() -> None:
    """Make this rank's device the current one of this thread: a thread begins with device 0, whatever the others use.

    The engine binds rank LOCAL_RANK to the device of that number, so a rank must see its neighbours' devices too.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        deepspeed.accelerator.get_accelerator().set_device(local)
    except RuntimeError as error:
        raise ValueError(
            f"LOCAL_RANK is {local}, but this process cannot use device {local} ({str(error).splitlines()[0]}). Start "
            f"as many ranks as there are GPUs, and let each see all of its node's: with Slurm --gpus-per-node, not "
            f"--gpus-per-task; or set CUDA_VISIBLE_DEVICES alike for all"
        ) from error


def start_distributed() -> bool:
    """Take the device, then tell the engine of the process group, or start one from the launcher's environment.

    Every rank must call this. What asks for the current device before would find device 0 on every rank. Returns
    whether one was started, which is then the caller's to end.
    """
    take_device()
    was_there = has_group()
    if deepspeed.comm.is_initialized():
        return False
    # on CPU DeepSpeed compiles a shared-memory all-reduce for inference at its first start: half a minute and a C++
    # compiler, for a kernel that training never calls
    if "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:  # started by hand, without a launcher: a world of one
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(alone)
    # or each reduction of a gradient on CPU starts a program that counts the sockets
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    accelerator = deepspeed.accelerator.get_accelerator()
    # not DeepSpeed's ten minutes, in which rank 0 does not fetch a base; who stands still in a step, the watch ends
    limit = deepspeed.constants.default_pg_timeout if "DEEPSPEED_TIMEOUT" in os.environ else PATIENCE
    be_patient(limit)
    # bound to the device as the engine binds it: a world of one is not (DeepSpeed issue 8248)
    is_bound = accelerator.device_name() == "cuda" and os.environ["WORLD_SIZE"] != "1"
    device = engine_device() if is_bound else None
    join_restarted(accelerator.communication_backend_name(), limit, device=device)
    deepspeed.init_distributed(timeout=limit)
    return not was_there


def end_distributed() -> None:
    """End every process group, after the last collective; every rank must call this.

    What an exit tears down itself, NCCL complains about, and sometimes hangs in.
    """
    deepspeed.comm.destroy_process_group()


def engine_device() -> torch.device:
    """Return the device that the engine computes on."""
    return torch.device(deepspeed.accelerator.get_accelerator().current_device_name())


def backward(engine: Any, local_sum: Tensor, step_total: float) -> None:
    """Back-propagate one micro-batch's share: a sum over this rank's part of a step whose total weight is given."""
    engine.backward(local_sum * (engine.world_size / step_total), scale_wrt_gas=False)
    only_root_runs(engine.module)


def require_step_applied(engine: Any, step: int) -> None:
    """Raise unless the last `engine.step()` changed the weights: ZeRO-3 skips a non-finite norm silently."""
    if not engine.was_step_applied():
        keep_whole(engine)
        raise NotFinite(
            f"step {step}: the engine did not apply the update; the gradient norm was {engine.get_global_grad_norm()}"
        )


def _check(module: nn.Module, options: EngineOptions) -> None:
    if options.dtype not in ("bfloat16", "float32"):
        raise ValueError(f"engine dtype {options.dtype!r} is not one of bfloat16, float32")
    if options.micro_batches_per_step < 1:
        raise ValueError(f"micro_batches_per_step: {options.micro_batches_per_step} must be at least 1")
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError("nothing trains: no parameter requires a gradient; choose what to adapt or to train")
    meta = [name for name, p in [*module.named_parameters(), *module.named_buffers()] if p.is_meta]
    if meta:
        raise ValueError(f"{len(meta)} tensors are still on meta, first {meta[0]}: load the weights before the engine")


def _largest_layer(module: nn.Module) -> int:
    """Return the elements of the largest block of a stack, all of which is needed at once."""
    stacks = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    sizes = (sum(getattr(p, "ds_numel", p.numel()) for p in block.parameters()) for m in stacks for block in m)
    return max(sizes, default=0)


def _decay_groups(group: Group, weight_decay: float) -> list[dict[str, Any]]:
    """Split so that vectors (norms, biases) are never decayed."""
    ndim = [len(getattr(p, "ds_shape", p.shape)) for p in group.parameters]
    matrices = [p for p, n in zip(group.parameters, ndim, strict=True) if n > 1]
    vectors = [p for p, n in zip(group.parameters, ndim, strict=True) if n <= 1]
    common = {"lr": group.peaks[0], "peaks": tuple(group.peaks)}
    split = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [common | part for part in split if part["params"]]


def _has(config: Mapping[str, Any], dotted: str) -> bool:
    here: Any = config
    for part in dotted.split("."):
        if not isinstance(here, Mapping) or part not in here:
            return False
        here = here[part]
    return True


def _shared(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys that both set."""
    keys = []
    for key, value in theirs.items():
        if isinstance(value, Mapping) and isinstance(ours.get(key), Mapping):
            keys += _shared(ours[key], value, f"{prefix}{key}.")
        elif key in ours:
            keys.append(f"{prefix}{key}")
    return keys


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(ours[key], value) for key, value in theirs.items() if isinstance(ours.get(key), Mapping)}
    return {**theirs, **ours, **both}


def gathered(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which a partitioned parameter is whole; every rank of its group must enter it.

    One that is whole already stays so: the engine's context would leave it partitioned.
    """
    in_pieces = getattr(tensor, "ds_status", ZeroParamStatus.AVAILABLE) is not ZeroParamStatus.AVAILABLE
    whole: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([tensor], enabled=in_pieces)
    return whole
