"""The order in which a run takes its device, makes groups and starts threads: what only a GPU would complain about."""

import datetime
import functools
import socket
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from base_folders import write_base
from deepspeed.accelerator import get_accelerator
from engine_calls import FIRST_LOCAL, MADE, Call, run
from ranks import run_ranks
from tiny_moe import vl_model

from finetune.ranks.collectives import PATIENCE
from finetune.ranks.engine import start_distributed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(vl_model(), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[Call]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    calls: list[list[Call]] = run_ranks(run, request.param, base, tmp_path_factory.mktemp("run"), port)
    return calls


def test_a_rank_takes_its_own_device_before_anything_else(ranks: list[list[Call]]) -> None:
    for rank, calls in enumerate(ranks):
        assert (calls[0].what, calls[0].value) == ("set_device", rank + FIRST_LOCAL)
        # the engine sets it again, also as a torch.device, which on a CPU has no number
        taken = {call.value for call in calls if call.what == "set_device"} - {torch.device("cpu")}
        assert taken == {rank + FIRST_LOCAL}
        whats = [call.what for call in calls]
        assert whats.index("set_device") < whats.index(MADE) < whats.index("current_device_name")


def test_groups_are_made_only_at_setup_and_by_the_main_thread(ranks: list[list[Call]]) -> None:
    for calls in ranks:
        assert {(call.phase, call.thread) for call in calls if call.what == MADE} == {("set-up", "MainThread")}


def test_streams_are_entered_in_steps_by_the_main_thread(ranks: list[list[Call]]) -> None:
    for calls in ranks:
        places = {(call.phase, call.thread) for call in calls if call.what == "stream"}
        assert places == {("step", "MainThread"), ("step after", "MainThread")}


def test_no_group_ends_a_run_while_all_wait_for_rank_0(ranks: list[list[Call]]) -> None:
    for calls in ranks:
        assert {call.value.limit for call in calls if call.what == MADE} == {PATIENCE}


def test_the_thread_that_saves_takes_the_rank_s_device_first(ranks: list[list[Call]]) -> None:
    for rank, calls in enumerate(ranks):
        theirs = [call for call in calls if call.thread != "MainThread"]
        assert {(call.thread, call.phase) for call in theirs} == {("checkpoint", "save behind")}
        assert (theirs[0].what, theirs[0].value) == ("set_device", rank + FIRST_LOCAL)


@pytest.mark.parametrize("restarts", [0, 1])
@pytest.mark.parametrize(("world", "bound"), [(2, torch.device("cuda", 1)), (1, None)])
def test_a_group_on_gpus_is_bound_to_the_device_of_the_rank_even_after_a_restart(
    world: int, bound: torch.device | None, restarts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _asked(monkeypatch, world=world, restarts=restarts) == {"device_id": bound, "timeout": PATIENCE}


def test_the_user_s_timeout_also_applies_to_groups_of_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = datetime.timedelta(minutes=7)
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "7")
    monkeypatch.setattr(deepspeed.constants, "default_pg_timeout", mine)  # read when it was imported
    assert _asked(monkeypatch, world=2, restarts=0)["timeout"] == mine
    assert {dist.distributed_c10d._get_default_timeout(kind) for kind in ("gloo", "nccl")} == {mine}


def _asked(monkeypatch: pytest.MonkeyPatch, *, world: int, restarts: int) -> dict[str, Any]:
    """Return the calls to torch for a group on two GPUs that torch's agent starts."""

    class Asked(Exception):
        pass

    @functools.wraps(dist.init_process_group)  # the engine inspects its parameters
    def ask(*_: Any, **options: Any) -> None:
        raise Asked(options)

    agent_s = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "LOCAL_RANK": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": agent_s.port,
        "TORCHELASTIC_RESTART_COUNT": restarts,
    }.items():
        monkeypatch.setenv(name, str(value))
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):  # restored after the test
        monkeypatch.setattr(dist.distributed_c10d, name, datetime.timedelta(0))
    # like cuda_accelerator.py: from torch's current device
    current, kind = [0], type(get_accelerator())
    monkeypatch.setattr(kind, "set_device", lambda _, number: current.insert(0, number))
    monkeypatch.setattr(kind, "current_device_name", lambda _: f"cuda:{current[0]}")
    monkeypatch.setattr(kind, "device", lambda _, number: torch.device("cuda", number))
    monkeypatch.setattr(kind, "device_name", lambda _, *number: "cuda")
    monkeypatch.setattr(dist, "init_process_group", ask)
    with pytest.raises(Asked) as asked:
        start_distributed()
    (options,) = asked.value.args
    return {name: options.get(name) for name in ("device_id", "timeout")}


def test_a_rank_that_does_not_see_its_device_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any, number: int) -> None:
        raise RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be ...")

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(type(get_accelerator()), "set_device", refuse)
    words = r"^LOCAL_RANK is 3, but this process cannot use device 3 \(CUDA error: invalid device ordinal\)\. Start one"
    with pytest.raises(ValueError, match=words):
        start_distributed()
