"""The engine's dictionary, its limits, the comparison of ranks before it starts, and steps that it silently skips."""

import contextlib
import json
from typing import Any

import places
import pytest
import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.utils import safe_get_full_fp32_param
from ranks import run_ranks
from torch import nn

from benchmarks.harness.collectives import CollectiveCounter
from finetune.ranks.collectives import parameter_table, rank_and_world, require_equal_tables, sum_over_ranks
from finetune.ranks.engine import (
    LIMITS,
    EngineOptions,
    backward,
    engine_config,
    gathered,
    initialize,
    require_step_applied,
    start_distributed,
)

GOLDEN = places.GOLDEN / "engine_config.json"


def nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def test_the_dictionary_equals_the_golden_one() -> None:
    # To renew: PYTHONPATH=.:tests/harness python -c \
    #   'from tests.ranks.test_engine import *; GOLDEN.write_text(json.dumps(golden(), indent=2) + "\n")'
    assert golden() == json.loads(GOLDEN.read_text())


def golden() -> dict[str, Any]:
    return engine_config(EngineOptions(micro_batches_per_step=4), largest_layer=302_000_000, trained=80_000_000)


def test_extra_adds_keys_to_ours() -> None:
    extra = {"zero_optimization": {"round_robin_gradients": True}, "dump_state": True}
    config = engine_config(EngineOptions(extra=extra))
    assert config["dump_state"] is True
    assert config["zero_optimization"]["round_robin_gradients"] is True
    assert config["zero_optimization"]["stage"] == 3


def test_extra_may_not_override_and_every_key_is_listed() -> None:
    extra = {"gradient_clipping": 2.0, "bf16": {"enabled": False}, "zero_optimization": {"reduce_bucket_size": 1}}
    with pytest.raises(ValueError, match="cannot be overridden") as error:
        engine_config(EngineOptions(extra=extra))
    for key in ("gradient_clipping", "bf16.enabled", "zero_optimization.reduce_bucket_size"):
        assert f"engine.extra.{key}: moetune sets this key itself" in str(error.value)


@pytest.mark.parametrize("key", LIMITS)
def test_unsupported_keys_are_refused_with_the_reason(key: str) -> None:
    with pytest.raises(ValueError, match=rf"engine\.extra\.{key}: {LIMITS[key][:20]}"):
        engine_config(EngineOptions(extra=nested(key, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "engine dtype must be bfloat16 or float32, got 'float16'"),
        ({"micro_batches_per_step": 0}, "micro_batches_per_step must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        initialize(nn.Linear(3, 5), EngineOptions(**options))


def test_a_model_that_trains_nothing_or_is_not_loaded_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing trains: no parameter requires a gradient"):
        initialize(nn.Linear(3, 5).requires_grad_(False), EngineOptions())
    with torch.device("meta"):
        model = nn.Linear(3, 5)
    with pytest.raises(
        ValueError, match=r"weights are not loaded yet \(weight and 1 more on the meta device\): load them"
    ):
        initialize(model, EngineOptions())


def test_outside_a_process_group_there_is_one_rank() -> None:
    assert rank_and_world() == (0, 1)
    assert sum_over_ranks([1.5, 2.0], torch.device("cpu")) == [1.5, 2.0]
    require_equal_tables("Parameters", {"a": "(1,)"}, torch.device("cpu"))


def comparing(rank: int, world: int) -> dict[str, str]:
    """Return the errors of ranks with different shapes, names, dtypes or orders, and of equal ranks."""
    small, wide = nn.Linear(3, 5), nn.Linear(3, 7)
    tables = {
        "shape": parameter_table(small if rank == 0 else wide),
        "name": {"a": "x"} | ({"b": "x"} if rank == 0 else {}),
        "dtype": parameter_table(small if rank == 0 else nn.Linear(3, 5).bfloat16()),
        "training": parameter_table(small if rank == 0 else nn.Linear(3, 5).requires_grad_(False)),
        "order": {"a": "x", "b": "x"} if rank == 0 else {"b": "x", "a": "x"},
        "many": {f"p{i}": str(rank) for i in range(20)},
        "buffer": parameter_table(nn.BatchNorm1d(3 + rank, affine=False)),
        "same": parameter_table(small),
    }
    messages = {"sum": str(sum_over_ranks([rank + 1.0], torch.device("cpu")))}
    for name, table in tables.items():
        try:
            require_equal_tables("Parameters", table, torch.device("cpu"))
        except ValueError as error:
            messages[name] = str(error)
    return messages


class Toy(nn.Module):
    """A linear model whose loss is a sum over the given tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(5, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.inner(x)).square().sum()


def hooks_of(model: nn.Module) -> dict[str, int]:
    return {name: len(part._forward_hooks) + len(part._forward_pre_hooks) for name, part in model.named_modules()}


def whole(model: nn.Module) -> list[bool]:
    return [tuple(p.shape) == tuple(p.ds_shape) for p in model.parameters()]


def fetching() -> dict[str, Any]:
    """Observe an engine that keeps vectors and fetches matrices, and a forward that fails in a fetching module."""
    model, running = Toy(), list[list[nn.Module]]()
    engine = initialize(model, EngineOptions(dtype="float32", persistence_threshold=3))
    model.register_forward_pre_hook(lambda *_: running.append(list(FWD_MODULE_STACK)))
    for columns in (5, 4, 5):
        with contextlib.suppress(RuntimeError):
            engine(torch.ones(2, columns))
    state: dict[str, Any] = {"hooks": {"matrices fetched": hooks_of(model)}}
    state["running"] = [modules == [model] for modules in running]
    with gathered(model.inner.weight):
        state["gathered"] = whole(model)
    state["partitioned"] = whole(model)
    engine.destroy()
    return state


def stepping(rank: int, world: int) -> dict[str, Any]:
    """Observe an engine in bfloat16: dtypes of collectives and masters, weight decay, an infinite gradient."""
    start_distributed()
    state: dict[str, Any] = fetching()
    model = Toy()
    engine = initialize(model, EngineOptions(lr=0.1, weight_decay=0.5, clip_norm=1e9))
    state["hooks"] |= {"all kept": hooks_of(model)}
    state["whole"] = {"after the start": whole(model)}
    master = [safe_get_full_fp32_param(p).clone() for p in model.parameters()]
    x = torch.full((4, 5), 0.25 + rank, dtype=torch.bfloat16)
    with CollectiveCounter() as counter:
        backward(engine, engine(x) * 0.0, 8)
    state["reduced"] = {kind.dtype for kind in counter.calls if "reduce" in kind.collective}
    state["accumulated"] = {g.dtype for gs in engine.optimizer.averaged_gradients.values() for g in gs}
    engine.step()
    require_step_applied(engine, 1)
    after = [safe_get_full_fp32_param(p) for p in model.parameters()]
    state["masters"] = {p.dtype for p in after}
    state["decay"] = [float((b / a).nanmean()) for a, b in zip(master, after, strict=True)]
    backward(engine, engine(x * float("inf")), 8)
    engine.step()
    try:
        require_step_applied(engine, 2)
    except RuntimeError as error:
        state["skipped"] = str(error)
    state["whole"]["after a skipped step"] = whole(model)
    with gathered(model.inner.weight):
        pass
    state["whole"]["after it was asked for whole"] = whole(model)
    engine.destroy()
    other = Toy() if rank == 0 else nn.Sequential(Toy())
    try:
        initialize(other, EngineOptions())
    except ValueError as error:
        state["other"] = str(error)
    return state


def both(rank: int, world: int) -> tuple[dict[str, str], dict[str, Any]]:
    return comparing(rank, world), stepping(rank, world)


@pytest.fixture(scope="module")
def two_ranks() -> list[tuple[dict[str, str], dict[str, Any]]]:
    return run_ranks(both, 2)


def test_only_modules_that_fetch_have_hooks(two_ranks: Any) -> None:
    for _, state in two_ranks:
        assert state["hooks"] == {
            "all kept": {"": 4, "inner": 0, "norm": 0},  # the outermost module has the engine's own hooks
            "matrices fetched": {"": 5, "inner": 4, "norm": 0},  # and one of the test
        }


def test_kept_parameters_are_always_complete(two_ranks: Any) -> None:
    for _, state in two_ranks:
        assert state["whole"] == dict.fromkeys(
            ("after the start", "after a skipped step", "after it was asked for whole"), [True] * 4
        )
        assert state["gathered"] == [True] * 4
        assert state["partitioned"] == [False, True, True, True]


def test_a_failed_forward_does_not_affect_the_next(two_ranks: Any) -> None:
    for _, state in two_ranks:
        assert state["running"] == [True] * 3


def test_all_ranks_name_the_differences(two_ranks: Any) -> None:
    for messages, _ in two_ranks:
        assert messages["sum"] == "[3.0]"
        assert messages["shape"].startswith(
            "Parameters differ between ranks (rank 0 and rank 1):\n  weight: (5, 3) float32"
        )
        assert "weight: (5, 3) float32 trained on rank 0, (7, 3) float32 trained on rank 1" in messages["shape"]
        assert "b: x on rank 0, absent on rank 1" in messages["name"]
        assert "bias: (5,) float32 trained on rank 0, (5,) bfloat16 trained on rank 1" in messages["dtype"]
        assert "float32 trained on rank 0, (5, 3) float32 frozen on rank 1" in messages["training"]
        assert "running_mean: (3,) float32 buffer on rank 0, (4,) float32 buffer on rank 1" in messages["buffer"]
        assert "entry 0 is a on rank 0, b on rank 1: the order differs" in messages["order"]
        assert "... and 12 more" in messages["many"]
        assert "same" not in messages


def test_ranks_are_compared_before_the_engine_starts(two_ranks: Any) -> None:
    for _, state in two_ranks:
        assert "inner.weight: (3, 5) float32 trained on rank 0, absent on rank 1" in state["other"]


def test_bfloat16_keeps_gradients_and_masters_in_float32(two_ranks: Any) -> None:
    for _, state in two_ranks:
        assert state["reduced"] == {"float32"}
        assert state["accumulated"] == {torch.float32}
        assert state["masters"] == {torch.float32}


def test_vectors_are_not_decayed(two_ranks: Any) -> None:
    weight, bias, norm, norm_bias = two_ranks[0][1]["decay"]
    assert weight == pytest.approx(1 - 0.1 * 0.5)
    assert bias == norm == 1.0
    assert norm_bias != norm_bias  # 0 / 0: it was zero and still is


def test_a_skipped_step_is_an_error(two_ranks: Any) -> None:
    for _, state in two_ranks:
        assert "step 2: the engine did not apply the update; the gradient norm was" in state["skipped"]
