"""The engine: DeepSpeed ZeRO-3, built from typed options, and the one rule that scales losses.

The rule: every loss term passes `local_sum * world / N_step` to `backward`. The engine averages over the ranks, and
nothing divides by the accumulation count, so N_step alone decides. A gradient injected in backward follows the rule.
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
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor, nn

from finetune.ranks.adamw import AdamW
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
from finetune.ranks.log import listed

_TRACKED = "metrics are tracked by track.* in the run's folder"
LIMITS = {
    "zero_optimization.stage": "the engine is always ZeRO-3",
    "zero_optimization.zero_quantized_gradients": "expert parallelism cannot use quantized gradients",
    "zero_optimization.zero_quantized_weights": "expert parallelism cannot use quantized weights",
    "zero_optimization.zero_hpz_partition_size": "expert parallelism cannot use hpZeRO's secondary partitions",
    "zero_optimization.mics_shard_size": "expert parallelism cannot use MiCS",
    "zero_optimization.offload_optimizer": "optim.offload keeps the moments in host memory",
    "zero_optimization.offload_param": "checkpoints hold the device's parameter slices, not offloaded ones",
    "expert_parallel": "the experts are placed by parallel.ep, before the engine starts",
    "tensor_parallel": "expert parallelism cannot be combined with the engine's tensor parallelism",
    "sequence_parallel_size": "parallel.sp sets sequence parallelism, and the engine must not know of it",
    "pipeline": "pipeline parallelism is not supported",
    "fp16": "loss scaling is not supported: train in bfloat16 or float32",
    "optimizer": "optim.* sets the optimizer",
    "scheduler": "schedule.* and optim.lr set the learning rate",
    "csv_monitor": f"{_TRACKED}, and this monitor writes outside it",
    "tensorboard": f"{_TRACKED}: set track.tensorboard",
    "wandb": f"{_TRACKED}: set track.wandb",
    "comet": _TRACKED,
    "flops_profiler.output_file": f"{_TRACKED}, and this file may be outside it",
    "autotuning": "the engine would start its own runs, and write outside the run's folder",
    "compile": "the layers exchange rows between ranks and cannot be compiled by the engine",
}
"""Dotted keys that `engine.extra` must not set, and why."""


class NotFinite(RuntimeError):
    """The loss or gradient of a step is not finite, on every rank alike; the weights are those of the step before."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The options of a step; `extra` may add keys to the DeepSpeed config, but not change one that is set here."""

    micro_batches_per_step: int = 1
    clip_norm: float = 1.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    moments: Literal["float32", "bfloat16"] = "float32"
    offload: bool = False
    persistence_threshold: int = PERSISTENCE
    """Smaller parameters are gathered once per step, not once per micro-batch."""
    prefetch_elements: int | None = None
    """Elements of partitioned weights to fetch ahead; None: more than the largest layer, unlike DeepSpeed's default."""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters with the same learning rates: the highest in each stage, or 0 in a stage that does not train them."""

    parameters: Sequence[nn.Parameter]
    peaks: Sequence[float]


def engine_config(options: EngineOptions, *, largest_layer: int = 0, trained: int = 0) -> dict[str, Any]:
    """Return the DeepSpeed config; `largest_layer` and `trained` are numbers of elements."""
    ahead = options.prefetch_elements
    if ahead is None:
        ahead = max(LEAST_PREFETCH, int(PREFETCHED_LAYERS * largest_layer))
    ours = {
        "train_micro_batch_size_per_gpu": 1,  # a micro-batch is one packed row
        "gradient_accumulation_steps": options.micro_batches_per_step,
        "gradient_clipping": options.clip_norm,
        "bf16": {"enabled": options.dtype == "bfloat16"},
        # otherwise gradients of a bfloat16 model are accumulated and reduced in bfloat16
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
        f"{key}: moetune sets this key itself, and it cannot be overridden"
        for key in shared
        if key not in "".join(refused)
    ]
    if refused or taken:
        raise ValueError("\n".join([*refused, *taken]))
    return _merged(ours, options.extra)


def initialize(module: nn.Module, options: EngineOptions, groups: Sequence[Group] | None = None) -> Any:
    """Start the engine on `module` and return it; every rank must call this with the same parameters.

    `groups` hold each trained parameter once; None: all of them at options.lr. The ranks compare names, shapes and
    dtypes first: a difference is a ValueError on all of them, not a hang.
    """
    _check(module, options)
    start_distributed()
    device = engine_device()
    require_equal_tables("Parameters and buffers", parameter_table(module), device)
    trained = [p for p in module.parameters() if p.requires_grad]
    config = engine_config(
        options, largest_layer=_largest_layer(module), trained=sum(getattr(p, "ds_numel", p.numel()) for p in trained)
    )
    # torch's fused AdamW, on the float32 masters: one kernel per group on CPU and CUDA, nothing compiled at start
    groups = [Group(parameters=trained, peaks=(options.lr,))] if groups is None else groups
    assert {id(p) for group in groups for p in group.parameters} == {id(p) for p in trained}
    made = [made for group in groups for made in _decay_groups(group, options.weight_decay)]
    optimizer = AdamW(
        made,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        moments=getattr(torch, options.moments),
        offload=options.offload,
    )
    if AdamW not in ZERO_SUPPORTED_OPTIMIZERS:  # the engine asks for torch's class itself, not for one made from it
        ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    settle_hooks(engine, [p for group in groups if all(group.peaks) for p in group.parameters])
    return engine


def take_device() -> None:
    """Make this rank's device the current device of this thread: every new thread begins with device 0.

    The engine binds rank LOCAL_RANK to the device of that number, so a rank must see its neighbours' devices too.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        deepspeed.accelerator.get_accelerator().set_device(local)
    except RuntimeError as error:
        raise ValueError(
            f"LOCAL_RANK is {local}, but this process cannot use device {local} ({str(error).splitlines()[0]}). Start "
            f"one rank per GPU, and let each rank see all GPUs of its node: with Slurm, use --gpus-per-node instead of "
            f"--gpus-per-task; otherwise set the same CUDA_VISIBLE_DEVICES for all ranks"
        ) from error


def start_distributed() -> bool:
    """Take the device, then give the engine the process group, or start one from the launcher's environment.

    Every rank must call this, before anything asks for the current device: that would be device 0 on every rank.
    Returns whether a group was started, which the caller must then end.
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
    # otherwise each reduction of a gradient on CPU starts a program that counts the sockets
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    accelerator = deepspeed.accelerator.get_accelerator()
    # not DeepSpeed's ten minutes: rank 0 may take longer to fetch a base. The watch ends ranks that stall in a step
    limit = deepspeed.constants.default_pg_timeout if "DEEPSPEED_TIMEOUT" in os.environ else PATIENCE
    be_patient(limit)
    # bound to a device where the engine binds it, which it does not in a world of one (DeepSpeed issue 8248)
    is_bound = accelerator.device_name() == "cuda" and os.environ["WORLD_SIZE"] != "1"
    device = engine_device() if is_bound else None
    join_restarted(accelerator.communication_backend_name(), limit, device=device)
    deepspeed.init_distributed(timeout=limit)
    return not was_there


def end_distributed() -> None:
    """End every process group, after the last collective; every rank must call this.

    NCCL complains, and sometimes hangs, if the exit of the process has to tear them down.
    """
    deepspeed.comm.destroy_process_group()


def engine_device() -> torch.device:
    """Return the device that the engine computes on."""
    return torch.device(deepspeed.accelerator.get_accelerator().current_device_name())


def backward(engine: Any, local_sum: Tensor, step_total: float) -> None:
    """Back-propagate the loss sum of one micro-batch of this rank; `step_total` is the total weight of the step."""
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
        raise ValueError(f"engine dtype must be bfloat16 or float32, got {options.dtype!r}")
    if options.micro_batches_per_step < 1:
        raise ValueError(f"micro_batches_per_step must be at least 1, got {options.micro_batches_per_step}")
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError("nothing trains: no parameter requires a gradient. Choose parts to adapt or to train in full")
    meta = [name for name, p in [*module.named_parameters(), *module.named_buffers()] if p.is_meta]
    if meta:
        raise ValueError(
            f"the weights are not loaded yet ({listed(meta, 1)} on the meta device): load them before the engine starts"
        )


def _largest_layer(module: nn.Module) -> int:
    """Return the elements of the largest block of a stack; a block is needed all at once."""
    stacks = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    sizes = (sum(getattr(p, "ds_numel", p.numel()) for p in block.parameters()) for m in stacks for block in m)
    return max(sizes, default=0)


def _decay_groups(group: Group, weight_decay: float) -> list[dict[str, Any]]:
    """Split a group, so that vectors (norms, biases) are never decayed."""
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
    """Return a context in which a partitioned parameter is complete; every rank of its group must enter it.

    A parameter that is complete already stays so; the engine's context would leave it partitioned.
    """
    in_pieces = getattr(tensor, "ds_status", ZeroParamStatus.AVAILABLE) is not ZeroParamStatus.AVAILABLE
    whole: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([tensor], enabled=in_pieces)
    return whole
