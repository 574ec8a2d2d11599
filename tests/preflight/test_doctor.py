"""Every finding of the doctor, provoked; the nodes together for real; and pages of runs that hung or died."""

import json
import pickle
import resource
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from limits import LIMIT_S
from ranks import run_ranks
from starts import environment, toy_run
from torch.distributed.flight_recorder.components.builder import build_db
from torch.distributed.flight_recorder.components.config_manager import JobConfig
from torch.distributed.flight_recorder.components.loader import read_dir

from finetune.preflight.cluster_check import RankFacts, findings
from finetune.preflight.doctor import (
    LEAST,
    descriptor_findings,
    driver_findings,
    kernel_findings,
    memory_findings,
    reader_findings,
    version_findings,
    visible_findings,
    wandb_findings,
)
from finetune.ranks.autopsy import page
from finetune.ranks.flight import write_flight
from finetune.ranks.versions import TESTED, installed_versions, numbers
from finetune.settings.recipes import load_recipe
from launchers.cli import main

GOOD = installed_versions([*TESTED, *LEAST])


def _config(*words: str):
    config, problems = load_recipe("tiny-cpu", words)
    assert not problems
    return config


def test_this_machine_s_versions_are_good() -> None:
    assert list(version_findings(GOOD)) == []


@pytest.mark.parametrize(
    ("installed", "text", "remedy"),
    [
        ({"torch": "2.10.0+cu128"}, "torch 2.10.0+cu128 is installed, and moetune is tested", "'torch>=2.11,<2.16'"),
        ({"torch": "2.16.0.dev20270101"}, "moetune is tested with torch>=2.11,<2.16", "'torch>=2.11,<2.16'"),
        ({"deepspeed": "0.19.3"}, "0.19.3 is installed, and moetune is tested", "'deepspeed>=0.19.8,<0.20'"),
        (
            {"deepspeed": "0.20.0"},
            "older versions leak and misreduce the experts of ZeRO-3",
            "'deepspeed>=0.19.8,<0.20'",
        ),
        ({"transformers": "6.0.1"}, "transformers 6.0.1 is installed", "pip install 'transformers>=5.23,<6'"),
        ({"peft": "0.18.0"}, "older versions do not read adapters on stacks of experts", "'peft>=0.21,<1'"),
        ({"flash-attn": "2.5.8"}, "older than 2.8", "torch's own kernel"),
        ({"nvidia-nccl-cu12": "2.21.5"}, "older than 2.27", "brings its own"),
    ],
)
def test_versions(installed, text, remedy) -> None:
    findings = "\n".join(map(str, version_findings(GOOD | installed)))
    assert text in findings
    assert remedy in findings


def test_a_missing_package() -> None:
    without = {name: have for name, have in GOOD.items() if name != "peft"}
    assert "peft is not installed" in str(next(version_findings(without)))


def test_kernels_that_are_asked_for_and_absent() -> None:
    none = {"deep_ep": False, "flash_attn": False}
    assert list(kernel_findings(_config(), present=none)) == []
    (deep,) = kernel_findings(_config("moe.dispatch=deepep"), present=none)
    assert "moe.dispatch=all_to_all" in deep.remedy
    (flash,) = kernel_findings(_config("model.attention=flash_attention_2"), present=none)
    assert "model.attention=auto" in flash.remedy


@pytest.mark.parametrize(
    ("smi", "text"),
    [
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "NVIDIA-SMI has failed"),
        ("NVIDIA H100, 550.90, 9.0, 3, 81559\nNVIDIA A100, 550.90, 8.0, 3, 81920", "GPUs of different kinds"),
        ("NVIDIA H100, 535.10, 9.0, 3, 81559", "driver 535.10 is older than 550.54"),
        ("NVIDIA A100, 550.90, 8.0, 3, 81559", "compute capability 8.0: experts run one by one there"),
        ("NVIDIA L40S, 550.90, 8.9, 3, 46068", "on 9.x and 10.x, in bfloat16"),
        ("NVIDIA RTX 5090, 580.90, 12.0, 3, 32607", "compute capability 12.0: experts run one by one there"),
        ("NVIDIA H100, 550.90, 9.0, 70123, 81559", "GPU 0 has 70,123 MiB in use already"),
    ],
)
def test_driver(smi: str, text: str) -> None:
    assert text in "\n".join(map(str, driver_findings(smi, {})))
    assert list(driver_findings(None, {})) == []
    assert list(driver_findings("NVIDIA H100, 550.90, 9.0, 3, 81559", {})) == []
    assert list(driver_findings("NVIDIA B200, 580.90, 10.0, 3, 183359", {})) == []


FOUR = "\n".join(["NVIDIA H100, 550.90, 9.0, 3, 81559"] * 4)


@pytest.mark.parametrize(
    ("smi", "ranks", "environment", "text"),
    [
        # Slurm with --gpus-per-task=1: each of four tasks has a GPU of its own, which is number 0 to it
        (
            FOUR.splitlines()[0],
            1,
            {"CUDA_VISIBLE_DEVICES": "0", "SLURM_LOCALID": "3"},
            "1 GPU can be seen (CUDA_V",
        ),
        (
            FOUR,
            4,
            {"CUDA_VISIBLE_DEVICES": "2,3"},
            "4 ranks of this node need a GPU each, but 2 GPUs can be seen (CUDA_VISIBLE_DEVICES=2,3)",
        ),
        (FOUR, 8, {}, "8 ranks of this node need a GPU each, but 4 GPUs can be seen"),
        (FOUR, 4, {}, ""),
        (FOUR, 2, {"CUDA_VISIBLE_DEVICES": "2,3", "LOCAL_RANK": "1"}, ""),
        (None, 8, {}, ""),
        ("no driver", 8, {}, ""),
    ],
)
def test_every_rank_must_see_its_gpu(smi: str | None, ranks: int, environment: dict[str, str], text: str) -> None:
    findings = list(visible_findings(smi, ranks=ranks, environment=environment))
    assert len(findings) == bool(text)
    assert all(text in one.text and "--gpus-per-node" in one.remedy for one in findings)


def test_a_torch_of_a_newer_cuda_wants_a_newer_driver() -> None:
    (finding,) = driver_findings("NVIDIA H100, 570.90, 9.0, 3, 81559", {"nvidia-nccl-cu13": "2.29.7"})
    assert "driver 570.90 is older than 580.65, which CUDA 13 wants" in str(finding)


def test_a_figure_that_a_sliced_gpu_does_not_tell_is_no_finding() -> None:
    assert not list(driver_findings("NVIDIA H100 MIG 1g.10gb, 580.90, [N/A], [N/A], [N/A]", {}))


def test_shared_memory_and_descriptors(tmp_path: Path) -> None:
    assert "--ipc=host" in str(next(memory_findings(tmp_path, ranks=10**6)))
    assert list(memory_findings(tmp_path, ranks=0)) == []
    assert "ulimit -n" in str(next(descriptor_findings(1024)))
    assert list(descriptor_findings(resource.RLIM_INFINITY)) == []


def test_descriptors_of_this_process_are_looked_at(tmp_path: Path) -> None:
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512));"
        "from launchers.cli import main; sys.exit(main(['doctor', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "at most 512 files" in json.loads(done.stdout)["findings"][-1]["text"]


def test_few_large_shards_for_many_readers(tmp_path: Path) -> None:
    shard = tmp_path / "000.tar"
    with shard.open("wb") as file:  # a large one of zeros takes no room on the disk
        file.truncate(2 * 10**9 // 512 * 512)
    (finding,) = reader_findings(_config(f"data.sources.general.path={shard}"), ranks=8)
    assert "source general has 1 shard for 16 readers" in finding.text
    assert "`moetune shards split` cuts them smaller" in finding.remedy
    assert list(reader_findings(_config("data.sources.general.path=/nowhere"), ranks=8)) == []


def test_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    online = _config("track.wandb=online")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        (login,) = wandb_findings(online, url=f"http://127.0.0.1:{port}")
        assert "nobody is logged in" in str(login)
    away = "\n".join(map(str, wandb_findings(online, url=f"http://127.0.0.1:{port}", timeout=1)))
    assert "cannot be reached" in away
    assert list(wandb_findings(_config(), url="http://127.0.0.1:1")) == []


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    toy_run(tmp_path)
    words = ["doctor", "tiny-cpu", "model.path=base", "data.sources.general.path=rows.jsonl"]
    assert main(words) in (0, 3)  # as the machine is
    assert "model.path" not in capsys.readouterr().out
    assert main([*words, "model.path=elsewhere", "--json"]) == 3
    found = {finding["check"]: finding["text"] for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert "there is no such file or folder" in found["model.path"]
    assert main(["doctor", "--cluster", "--nnodes", "2"]) == 2
    assert "needs --rdzv-endpoint" in capsys.readouterr().err


# --- the nodes together


def _rank(rank: int, **more) -> RankFacts:
    plain = RankFacts(
        rank=rank,
        host=f"node-{rank}",
        address=f"10.0.0.{rank + 1}",
        device="H100",
        versions="torch 2.13",
        network={},
        clock_offset=0.0,
        matmul=6e14,
        all_reduce=4e10,
        all_to_all=4e10,
        beside=3e11,
    )
    return replace(plain, **more)


@pytest.mark.parametrize(
    ("odd", "text"),
    [
        ({"versions": "torch 2.12"}, "versions: nodes differ"),
        ({"device": "A100"}, "device: nodes differ"),
        ({"network": {"NCCL_SOCKET_IFNAME": "docker0"}}, "NCCL_SOCKET_IFNAME differs between nodes"),
        ({"address": "172.17.0.2"}, "node-3 would speak through an address that others cannot reach"),
        ({"clock_offset": -61.0}, "the clock of node-3 is -61.0 s from rank 0's"),
        ({"matmul": 3e14}, "slow node: node-3 reaches 300.00 of matmul where nodes usually reach 600.00"),
        ({"all_to_all": 1e10}, "node-3 reaches 10.00 of all_to_all"),
        ({"beside": 1e10}, "node-3 reaches 10.00 of beside"),
    ],
)
def test_what_is_found_between_nodes(odd, text) -> None:
    nodes = [_rank(rank) for rank in range(4)]
    assert findings(nodes) == []
    assert text in "\n".join(map(str, findings([*nodes[:3], replace(nodes[3], **odd)])))


def test_two_ranks_measure_each_other(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launchers.cli", "doctor", "--cluster", "--ranks", "2", "--json"],
        cwd=tmp_path,
        env=environment() | {"GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    ranks = json.loads(done.stdout.strip().splitlines()[-1])["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert all(rank[what] > 0 for rank in ranks for what in ("all_reduce", "all_to_all", "beside", "matmul"))
    assert ranks[0]["network"]["GLOO_SOCKET_IFNAME"] == "lo"


# --- why did it hang or die?

STACK = 'Current thread 0x01 (most recent call first):\n  File "/x/moe/dispatch.py", line 9 in exchange\n'
ELSEWHERE = 'Current thread 0x01 (most recent call first):\n  File "/x/data/frames.py", line 7 in decode\n'


def _run(folder: Path, ranks: int = 3, **beat) -> Path:
    logs = folder / "logs"
    logs.mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {}\n")
    for rank in range(ranks):
        here = {
            "rank": rank,
            "host": f"node-{rank}",
            "pid": 1,
            "time": 1000.0,
            "step": 7,
            "stage": "backward",
            "samples": [f"s/{rank}"],
            "collective": None,
        }
        (logs / f"rank-{rank:04d}.json").write_text(json.dumps(here | beat))
        (logs / f"rank-{rank:04d}.log").write_text(f"rank {rank} says\n")
    return folder


def _page(folder: Path, now: float = 1005.0) -> str:
    lines, wrong = page(folder, now=now)
    assert wrong
    return "\n".join(lines)


def _put(folder: Path, name: str, **values) -> None:
    (folder / "logs" / name).write_text(json.dumps(values))


def test_the_rank_that_failed_first_leads_the_page(tmp_path: Path) -> None:
    run = _run(tmp_path / "r")
    _put(run, "failure-0000.json", rank=0, host="node-0", time=1001.0, kind="lost", message="Connection closed by peer")
    _put(run, "failure-0002.json", rank=2, host="node-2", time=1002.0, kind="failed", message="CUDA out of memory")
    page = _page(run, now=1100.0)
    assert page.index("rank 2 on node-2 ended first (failed): CUDA out of memory") < page.index("rank 0 ended after it")
    assert "rank 1 left no message: killed from outside" in page
    assert "rank 2 says" in page


def test_a_rank_whose_process_is_gone_is_dead_and_nobody_waits_for_it(tmp_path: Path) -> None:
    run, gone = _run(tmp_path / "r"), subprocess.Popen(["true"])
    gone.wait()
    beat = {"rank": 1, "host": socket.gethostname(), "pid": gone.pid, "time": 1000.0}
    _put(run, "rank-0001.json", **beat, step=None, stage="evaluation")
    _put(run, "failure-0000.json", rank=0, host="node-0", time=1001.0, kind="lost", message="Connection closed by peer")
    page = _page(run)
    assert f"rank 1 is dead: its process {gone.pid} on {socket.gethostname()} ended without a message" in page
    assert "wait for it" not in page
    _put(run, "failure-0000.json", rank=0, host="node-0", time=1001.0, kind="stall", message="step 7 stands")
    assert "is dead" not in _page(run)  # the launcher has ended it since


def test_a_rank_that_others_wait_for_is_named_with_its_samples_and_stack(tmp_path: Path) -> None:
    run = _run(tmp_path / "r")
    _put(run, "rank-0001.json", rank=1, host="node-1", time=1000.0, step=7, stage="data", samples=["s/bad.mp4"])
    for rank in range(3):
        (run / "logs" / f"rank-{rank:04d}.stack").write_text(ELSEWHERE if rank == 1 else STACK)
    page = _page(run)
    assert (
        "rank 1 is in step 7, data; most ranks are in step 7, backward, and wait for it; its samples: s/bad.mp4" in page
    )
    assert "rank 1 is in decode (frames.py:7), the others are in exchange (dispatch.py:9)" in page


def record(rank: int, world: int, logs: Path) -> None:
    """Ranks 0 and 1 wait in a sum that rank 2 does not join, in another group, before all have written."""
    both = dist.new_group([0, 1])
    dist.all_reduce(torch.ones(3))
    if rank < 2:
        dist.all_gather([torch.empty(2), torch.empty(2)], torch.ones(2), group=both)
    pending = dist.all_reduce(torch.ones(7), async_op=True) if rank < 2 else None
    write_flight(logs, rank)
    (logs / f"done-{rank}").touch()
    while len(list(logs.glob("done-*"))) < world:
        time.sleep(0.05)
    if pending is None:
        dist.all_reduce(torch.ones(7))
    else:
        pending.wait()


def test_real_flight_recorders_name_the_rank_that_did_not_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(tmp_path / "r")
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")
    run_ranks(record, 3, run / "logs")
    page = _page(run)
    wanted = "ranks 0, 1 wait in all_reduce [[7]], number 2 of gloo group 0 (default_pg), which rank 2 did not join"
    assert f"{wanted}: the last one there was all_reduce [[3]], number 1" in page
    assert "group 1" not in page.partition("rank  host")[0]  # there all have come
    assert "  gloo group 0 (default_pg) 2: all_reduce [[7]] waits" in page
    if numbers(GOOD["torch"]) >= (
        2,
        13,
    ):  # the files are torch's own, and its tool says the same; an older reads NCCL's
        arguments = JobConfig().parse_args([str(run / "logs"), "-p", "flight-gloo-"])
        database = build_db(*read_dir(arguments)[:1], arguments, read_dir(arguments)[1])
        assert [(one.collective_name, one.missing_ranks) for one in database.collectives if one.missing_ranks] == [
            ("gloo:all_reduce", {2})
        ]
    # a rank that left nothing, and one whose dump holds more than plain values: it is not opened
    (run / "logs" / "flight-gloo-2").write_bytes(pickle.dumps({"entries": [Path("x")]}))
    assert "wait in all_reduce [[7]], number 2 of gloo group 0 (default_pg); rank 2 left no record" in _page(run)


def test_ranks_of_one_group_in_different_collectives(tmp_path: Path) -> None:
    """Arguments in the form of NCCL's recorder: those that must be equal differ; the rows of an all-to-all may."""
    run = _run(tmp_path / "r")
    for rank, (what, rows) in enumerate((("all_to_all", 5), ("all_to_all", 3), ("_all_gather_base", 5))):
        entry = {
            "collective_seq_id": 41,
            "profiling_name": f"nccl:{what}",
            "state": "started",
            "input_sizes": [[rows]],
            "process_group": ("2", "ep"),
            "is_p2p": False,
            "retired": False,
            "frames": [{"name": "exchange", "filename": "/x/moe/dispatch.py", "line": 9}],
        }
        dump = {"entries": [entry], "pg_config": {"2": {"name": "2", "desc": "ep", "ranks": "[0, 1, 2]"}}}
        (run / "logs" / f"flight-{rank}").write_bytes(pickle.dumps(dump))
    wanted = (
        "ranks 0, 1 wait in all_to_all [[5]] called by exchange (dispatch.py:9), and rank 2 in _all_gather_base [[5]]"
    )
    assert f"{wanted} called by exchange (dispatch.py:9), both number 41 of nccl group 2 (ep)" in _page(run)


def test_runs_of_which_nothing_is_known_or_all_is_well(tmp_path: Path, capsys) -> None:
    run = _run(tmp_path / "r")
    assert "stopped from outside" in _page(run, now=5000.0)
    _put(run, "outcome.json", outcome="done", step=9)
    assert page(run, now=5000.0)[1] is False
    assert main(["doctor", str(run)]) == 0
    assert "the ranks report nothing wrong" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("")
    assert main(["doctor", str(tmp_path / "empty"), "--json"]) == 3
    assert "no rank has left anything" in json.loads(capsys.readouterr().out)["page"][0]


def test_a_cut_off_heartbeat_is_passed_over(tmp_path: Path) -> None:
    run = _run(tmp_path / "r")
    (run / "logs" / "rank-0000.json").write_text('{"rank": 0, "st')
    assert "stopped from outside" in _page(run, now=9000.0)
    assert "damaged, and ignored: rank-0000.json" in _page(run, now=9000.0)


@pytest.mark.parametrize("name", ["rank-0001.json", "failure-0001.json", "outcome.json"])
@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{" * 3000,
        "[" * 3000,
        '{"time": "now"}',
        '{"time": null}',
        '{"time": 1e400}',
        '{"time": NaN}',
        '{"time": 1' + "0" * 400 + "}",
        '{"time": 1.0, "step": [7]}',
        '{"time": 1.0, "stage": {"a": 1}}',
        '{"time": 1.0, "samples": "abc"}',
        '{"time": 1.0, "samples": 5}',
        '{"time": 1.0, "host": {}, "outcome": {}}',
        "\udcff\udcfe",
    ],
)
def test_damaged_words_of_a_rank_are_named(tmp_path: Path, name: str, text: str) -> None:
    run = _run(tmp_path / "r")
    (run / "logs" / name).write_text(text, errors="surrogateescape")
    lines, _ = page(run, now=1005.0)
    assert f"damaged, and ignored: {name}" in lines


def test_damaged_flight_recorders_are_named(tmp_path: Path) -> None:
    """Entries of another form, and every byte of a sound dump replaced in turn: none may end the page."""
    run = _run(tmp_path / "r")
    sound = {
        "process_group": ("2", "ep"),
        "profiling_name": "nccl:all_reduce",
        "collective_seq_id": 41,
        "input_sizes": [[5]],
        "state": "started",
        "frames": [{"filename": "/x/moe/dispatch.py", "name": "exchange", "line": 9}],
    }
    odd = [sound | {key: value} for key in sound for value in (None, 5, "x", [1], {"a": 1}, float("nan"))]
    records: list[object] = [[], 5, {"entries": 5}, {"pg_config": [1]}, {"pg_config": {"2": {"ranks": "[x"}}}]
    records += [{"entries": [5]}, {"entries": [{}]}, {"pg_config": {"2": {"ranks": '["a"]'}}}]
    for record in records:
        (run / "logs" / "flight-1").write_bytes(pickle.dumps(record))
        assert "damaged, and ignored: flight-1" in page(run, now=1005.0)[0], record
    whole = pickle.dumps({"entries": [sound], "pg_config": {"2": {"ranks": "[0, 1]"}}})
    for dump in [pickle.dumps({"entries": [sound, entry]}) for entry in odd] + [
        whole[:at] + bytes([byte]) + whole[at + 1 :] for at in range(len(whole)) for byte in (ord("."), 255)
    ]:
        (run / "logs" / "flight-1").write_bytes(dump)
        page(run, now=1005.0)
