"""Runs that are stopped, killed, or go wrong, as real processes: a resumed run equals an uninterrupted one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import wandb_file
from limits import LIMIT_S
from places import ROOT
from safetensors.torch import load_file, save_file
from starts import toy_run
from user_runs import TORCHRUN, TRAIN, beat, metrics, start

from data.stream.batch import LossSums, Step
from finetune.config import RunConfig
from finetune.ranks.failures import (
    Failure,
    Kind,
    Outcome,
    first_failure,
    keep_outcome,
    outcome_of,
    report_failure,
    tell,
    write_failure,
)
from finetune.ranks.heartbeats import Heartbeats
from finetune.ranks.log import RankLog
from finetune.training.bad_steps import IdleSteps, require_finite, saved_rows
from finetune.training.update import take_step
from launchers.cli import main
from launchers.render import SHUTDOWN
from launchers.train import verdict

LORA = ["adapters.attention.mode=lora", "adapters.experts.mode=lora", "adapters.router.mode=full", "moe.balance=global"]
RUN = [*LORA, "schedule.steps=5", "schedule.warmup_steps=2", "checkpoint.every_steps=2", "data.workers=1"]
RUN += ["data.tokens_per_pack=256"]  # two steps per epoch: a signal comes while workers read ahead
EVERY_FIGURE = {
    "step",
    "epoch",
    "tokens",
    "tokens_nonpad",
    "tokens_supervised",
    "images",
    "video_seconds",
    "loss",
    "loss_balance",
    "grad_norm",
    "lr",
    "seconds",
    "seconds_data",
    "tokens_per_second",
    "tflops_model",
    "mfu",
    "memory_gb",
    "expert_load_max_over_mean",
    "expert_load_entropy",
    "experts_dead",
    "router_agreement",
    "sources",
}
CLOCKS = ("seconds", "seconds_data", "tokens_per_second", "tflops_model", "memory_gb")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_run(tmp_path_factory.mktemp("user"), 48, images=True)


AT_EXIT = """
import atexit, os, sys
def tell():
    if "RANK" in os.environ and (torch_s := sys.modules.get("torch.distributed")) is not None:
        with open("at-exit", "a") as file:
            file.write(f"rank {os.environ['RANK']}: {'a' if torch_s.is_initialized() else 'no'} process group\\n")
atexit.register(tell)
"""


@pytest.fixture(scope="module")
def whole(place: Path) -> str:
    """Return the output of an undisturbed run."""
    words = [*RUN, "track.wandb=offline", "track.load_every=2"]
    done = start(place, [*TRAIN, "--ranks", "2"], "whole", *words, site=AT_EXIT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_finished_run_has_ended_its_process_groups(place: Path, whole: str) -> None:
    assert sorted((place / "at-exit").read_text().splitlines()) == [f"rank {n}: no process group" for n in (0, 1)]


def _same_as_whole(place: Path, name: str) -> None:
    """Compare the adapter, and every figure of every step except times, bit for bit."""
    for one, other in zip(metrics(place, "whole"), metrics(place, name), strict=True):
        assert {k: v for k, v in one.items() if k not in CLOCKS} == {k: v for k, v in other.items() if k not in CLOCKS}
    ours, theirs = (
        load_file(place / "runs" / run / "adapter" / "adapter_model.safetensors") for run in ("whole", name)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_run_leaves_every_figure_and_one_wandb_run(place: Path, whole: str) -> None:
    folder = place / "runs" / "whole"
    steps = metrics(place, "whole")
    assert [step["step"] for step in steps] == list(range(5))
    assert all(set(step) >= EVERY_FIGURE for step in steps)
    explained = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "metrics.md").read_text()))
    assert explained >= steps[0].keys()
    assert all(step["mfu"] is None and step["tflops_model"] > 0 and step["images"] > 0 for step in steps)
    assert [step["epoch"] for step in steps] == [0, 0, 1, 1, 2]
    assert all(one["images"] + other["images"] <= 36 for one, other in zip(steps[:4:2], steps[1:4:2], strict=True))
    assert whole.count("mfu is null in metrics.jsonl: the peak of a CPU is unknown") == 1
    loads = [json.loads(line) for line in (folder / "expert_load.jsonl").read_text().splitlines()]
    assert [load["step"] for load in loads] == [0, 2, 4]
    assert sum(loads[0]["counts"][0]) == 2 * steps[0]["tokens_nonpad"]  # top-2 of the tiny base
    for load in loads:
        assert load["kinds"].keys() == {"text", "image", "other"}
        assert torch.tensor([*load["kinds"].values()]).sum(0).tolist() == load["counts"]
        assert load["sources"] == {"general": load["counts"]}
    assert len(list((folder / "media").glob("step-000000-*.png"))) == 4
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    assert all((folder / picture).is_file() for sample in samples for picture in sample["pictures"])
    assert all(re.match(r"It is \w+\.", "".join(t for t, loss in sample["parts"] if loss)) for sample in samples)
    assert whole.splitlines()[-1] == "report: runs/whole/report.html"
    assert '"state": {"word": "done"' in (folder / "report.html").read_text()
    (began,) = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert (began["step"], began["steps"], began["ranks"], began["device"]) == (0, 5, 2, "CPU")
    assert began["versions"]["torch"] == torch.__version__
    assert began["sources"]["general"] == {
        "samples": 48,
        "tokens": began["sources"]["general"]["tokens"],
        "licences": {"not stated": 24},
    }

    (run,) = folder.glob("wandb/offline-run-*")
    rows = wandb_file.history(run)
    assert [row["loss"] for row in rows if "loss" in row] == [step["loss"] for step in steps]
    by_source = [step["sources"]["general"]["loss"] for step in steps]
    assert [row["source/general/loss"] for row in rows if "loss" in row] == by_source
    assert [row["step"] for row in rows if "expert_load._type" in row] == [0, 2, 4]
    kinds = [record.WhichOneof("record_type") for record in wandb_file.records(run)]
    assert "artifact" in kinds
    assert not any("pictures" in key for row in rows for key in row)  # track.media=local

    for rank in (0, 1):
        log = (folder / "logs" / f"rank-{rank:04d}.log").read_text()
        stages = re.findall(r"--- (.*)", log)
        assert stages[:3] == ["base and empty model", "data", "weights and engine"]
        assert "writing the result" in stages
        assert beat(place, "whole", rank)["stage"] == "ended"
    assert json.loads((folder / "logs" / "outcome.json").read_text())["outcome"] == "done"


def _stop(number: int) -> Callable[[int], None]:
    return lambda pid: os.kill(pid, number)


IN_SAVE = """
import os, signal, sys, time
done = []
def at_its_file(event, arguments):
    if event == "open" and os.environ.get("RANK") == "1" and "shard-00002-" in str(arguments[0]) and not done:
        done.append(True)
        {what}
sys.addaudithook(at_its_file)
"""


def test_sigterm_saves_and_exits_75_and_the_same_command_continues_bit_for_bit(place: Path, whole: str) -> None:
    words = [*RUN, "track.wandb=offline", "track.load_every=2"]
    cut = start(place, [*TRAIN, "--ranks", "2"], "cut", *words, at="step 0:", then=_stop(signal.SIGTERM))
    assert cut.returncode == 75, cut.stderr[-3000:]
    done = int(re.search(r"stopped by SIGTERM after (\d) steps?; the same command continues from there", cut.stdout)[1])
    assert done in (1, 2, 3)
    assert re.search(rf"^so far: {done} steps? in 0:0\d:\d\d; [\d,]+ useful tokens$", cut.stdout, re.M)
    assert cut.stderr == "moetune train: preempted; run the same command again to continue\n"
    assert [path.name for path in (place / "runs" / "cut" / "checkpoints").glob("step-*")][-1:] == [f"step-{done:06d}"]
    again = start(place, [*TRAIN, "--ranks", "2"], "cut", *words)
    assert again.returncode == 0, again.stderr[-3000:]
    _same_as_whole(place, "cut")
    (run,) = (place / "runs" / "cut").glob("wandb/offline-run-*")
    losses = [row["loss"] for row in wandb_file.history(run) if "loss" in row]
    assert losses == [step["loss"] for step in metrics(place, "whole")]
    assert _last_words(again.stdout, "cut") == _last_words(whole, "whole")


def _last_words(said: str, name: str) -> list[str]:
    """Return the closing summary, which covers all starts, without its times."""
    words = said[said.index("\ndone: 5 steps in ") :].replace(f"runs/{name}/", "")
    return re.sub(r"\d+:\d\d:\d\d", "", words).splitlines()


@pytest.mark.parametrize(
    ("name", "command", "number"),
    [
        ("early", [*TRAIN, "--ranks", "2"], signal.SIGUSR1),
        pytest.param(  # the same with the command of a rendered job
            "warned",
            [*TORCHRUN, "--nproc_per_node=2", "--signals-to-handle=SIGTERM,SIGUSR1", "-m", "finetune.train"],
            signal.SIGUSR1,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_signal_before_the_first_step_ends_the_run_at_once(
    place: Path, name: str, command: list[str], number: int
) -> None:
    done = start(place, command, name, *RUN, at="loaded:", then=_stop(number))
    assert "step 0:" not in done.stdout
    logs = place / "runs" / name / "logs"
    for rank in (0, 1):  # the ranks end themselves; torchrun would end them 30 s later
        assert "no step has begun since the start: the rank ends now" in (logs / f"rank-{rank:04d}.log").read_text()
    if command[: len(TRAIN)] == TRAIN:
        assert done.returncode == 75, done.stderr[-3000:]
        words = "ended by a signal before it could save; the same command continues from the last save"
        assert done.stderr == f"moetune train: {words}\n"
    else:  # torchrun has one exit code for all: the job reads here whether to queue itself again
        assert json.loads((logs / "outcome.json").read_text())["outcome"] == "preempted"


@pytest.mark.slow  # two starts
def test_a_signal_interrupts_any_evaluation_and_the_next_start_repeats_it(place: Path) -> None:
    turns = [[{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": "Yes."}] for n in range(3000)]
    (place / "held-out.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    words = [*RUN, "schedule.steps=1", "schedule.warmup_steps=0", "eval.sources.words.path=held-out.jsonl"]
    words += ["data.workers=0", "eval.every_steps=1"]
    folder = place / "runs" / "judged"
    cut = start(place, [*TRAIN, "--ranks", "2"], "judged", *words, at="step 0:", then=_stop(signal.SIGTERM))
    assert cut.returncode == 75, cut.stderr[-3000:]
    assert "the evaluation at step 1 was interrupted; the next start repeats it" in cut.stdout
    assert "stopped by SIGTERM after 1 step" in cut.stdout
    assert (folder / "checkpoints" / "step-000001").exists()
    assert not (folder / "adapter").exists()
    again = start(place, [*TRAIN, "--ranks", "2"], "judged", *words)
    assert again.returncode == 0, again.stderr[-3000:]
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [one["step"] for one in evaluations] == [0, 1]
    assert evaluations[1]["words/samples"] == 3000
    assert (folder / "adapter").exists()


HANGS = """
import multiprocessing, os, sys, time
def second_epoch(event, arguments):  # its worker never comes back from opening its shard
    is_worker = os.environ.get("RANK") == "1" and multiprocessing.parent_process() is not None
    if event == "open" and is_worker and str(arguments[0]).endswith(".tar"):
        if [name for name in os.listdir(".") if name.startswith("read-by-") and name != f"read-by-{os.getpid()}"]:
            time.sleep(3600)
        os.makedirs(f"read-by-{os.getpid()}", exist_ok=True)
sys.addaudithook(second_epoch)
"""


@pytest.mark.slow  # two starts
def test_a_signal_interrupts_a_wait_for_data_and_nothing_is_lost(place: Path, whole: str) -> None:
    words = [*RUN, "checkpoint.every_steps=0", "track.wandb=offline", "track.load_every=2"]

    def stop(pid: int) -> None:
        deadline = time.monotonic() + LIMIT_S
        while (
            time.time() - (heartbeat := beat(place, "waits", 1))["time"] > 2 or heartbeat["stage"] != "waiting for data"
        ):
            assert time.monotonic() < deadline, heartbeat
            time.sleep(0.1)  # it writes a heartbeat every 4 s
        time.sleep(1)
        os.kill(pid, signal.SIGTERM)

    cut = start(
        place,
        [*TRAIN, "--ranks", "2"],
        "waits",
        *words,
        "run.stall_seconds=16",
        "data.stall_seconds=0",
        at="step 1:",
        then=stop,
        site=HANGS,
    )
    assert cut.returncode == 75, cut.stderr[-3000:]
    done = int(re.search(r"stopped by SIGTERM after (\d) steps?; the same command continues from there", cut.stdout)[1])
    assert done == 2
    again = start(place, [*TRAIN, "--ranks", "2"], "waits", *words)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"resumed: runs/waits/checkpoints/step-{done:06d}" in again.stdout
    _same_as_whole(place, "waits")


@pytest.mark.slow  # two starts
def test_a_signal_waits_for_the_asynchronous_save_and_writes_one_more(place: Path, whole: str) -> None:
    slow = IN_SAVE.format(what="time.sleep(5)")
    words = [*RUN, "checkpoint.every_steps=1", "checkpoint.asynchronous=true", "track.wandb=offline"]
    words += ["track.load_every=2"]
    cut = start(place, [*TRAIN, "--ranks", "2"], "behind", *words, at="step 0:", then=_stop(signal.SIGTERM), site=slow)
    assert cut.returncode == 75, cut.stderr[-3000:]
    done = int(re.search(r"stopped by SIGTERM after (\d) steps?; the same command continues from there", cut.stdout)[1])
    assert (place / "runs" / "behind" / "checkpoints" / f"step-{done:06d}").exists()
    again = start(place, [*TRAIN, "--ranks", "2"], "behind", *words)
    assert again.returncode == 0, again.stderr[-3000:]
    _same_as_whole(place, "behind")


@pytest.mark.slow  # two starts; test_train.py kills an entire run
def test_a_killed_rank_ends_the_others_and_an_elastic_restart_resumes(place: Path, whole: str) -> None:
    raw = [*TORCHRUN, "--nproc_per_node=2", "--max-restarts=1", "-m", "finetune.train"]
    killed = []

    def kill_rank_1(_: int) -> None:
        killed.append(time.time())
        os.kill(beat(place, "killed", 1)["pid"], signal.SIGKILL)

    done = start(place, raw, "killed", *RUN, at="step 3:", then=kill_rank_1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed: runs/killed/checkpoints/step-000002" in done.stdout
    failure = re.findall(r"^(\S+) failed \(lost\)", (place / "runs/killed/logs/rank-0000.log").read_text(), re.M)
    assert len(failure) == 1
    ended = time.mktime(time.strptime(failure[0][:19], "%Y-%m-%dT%H:%M:%S"))
    assert ended - killed[0] < 10
    _same_as_whole(place, "killed")


@pytest.mark.slow  # a start of its own; the parts have their own tests
def test_deepspeed_starts_a_run_and_a_broken_wandb_does_not_stop_it(
    place: Path, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "broken")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    (place / "runs" / "engine").mkdir(parents=True)
    (place / "runs" / "engine" / "wandb").write_text("a file where the client wants its folder")
    command = [str(Path(TRAIN[0]).with_name("deepspeed")), "--num_gpus=2", "--module", "finetune.train"]
    done = start(place, command, "engine", *RUN, "schedule.steps=1", "schedule.warmup_steps=0", "track.wandb=online")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [step["loss"] for step in metrics(place, "engine")] == [metrics(place, "whole")[0]["loss"]]
    assert done.stdout.count("warning: W&B: ") == 1
    assert (place / "runs" / "engine" / "adapter").exists()


@pytest.mark.slow  # two starts
def test_a_step_that_is_not_finite_is_saved_and_a_replay_names_the_module(place: Path) -> None:
    broken = place / "broken"
    broken.mkdir()
    for file in (place / "base").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    norm = "model.language_model.layers.1.self_attn.k_norm.weight"
    (file,) = [file for file in broken.glob("*.safetensors") if norm in load_file(file)]
    weights = load_file(file)
    weights[norm][3] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    words = [*LORA, "parallel.ep=1", "data.workers=0", "model.path=broken"]
    stopped = start(place, [*TRAIN], "nan", *words)
    assert stopped.returncode == 1
    message = re.search(r"rank 0 failed first: step 0: loss is nan; .* --replay (\S+) names", stopped.stderr)
    assert message is not None, stopped.stderr[-3000:]
    kept = Path(message[1])
    assert len(saved_rows(place / kept)) == 8
    again = start(place, [*TRAIN, f"--replay={kept}"], "nan", *words)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"weights that are not finite: {norm}" in again.stdout
    place_of_it = (
        r"the output of model\.language_model\.layers\.1\.self_attn\.k_norm \(\w+\), from finite inputs, in forward"
    )
    assert re.search(rf"first not finite: {place_of_it}, row 0 of rank 0: general/", again.stdout)


def _stopped_rank(place: Path, name: str) -> Callable[[int], None]:
    return lambda _: os.kill(beat(place, name, 1)["pid"], signal.SIGSTOP)


def _stopped_worker(place: Path, name: str) -> Callable[[int], None]:
    def stop(_: int) -> None:
        pid = beat(place, name, 1)["pid"]
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), signal.SIGSTOP)

    return stop


@pytest.mark.slow  # waits for its limits
@pytest.mark.parametrize(
    ("name", "stop", "limit", "text"),
    [
        (
            "stands",
            _stopped_rank,
            "run.stall_seconds=15",
            r"rank 0: collective stall: step \d+ has been stuck for 15 s",
        ),
        (
            "starves",
            _stopped_worker,
            "data.stall_seconds=15",
            r"rank 1: .*data stall.*[Bb]eing read: .*(\.tar|general/)",
        ),
    ],
)
def test_stalls_of_data_and_of_collectives_have_different_messages(
    place: Path,
    name: str,
    stop: Callable[[Path, str], Callable[[int], None]],
    limit: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(SHUTDOWN, "3")
    raw = [*TORCHRUN, "--nproc_per_node=2", "-m", "finetune.train"]
    # short packs: an epoch of 24 steps, so that a worker has more to read than it keeps ready
    words = [*RUN, "schedule.steps=200", "checkpoint.every_steps=0", "data.tokens_per_pack=128"]
    words += ["data.packs_per_step=2", limit]
    done = start(place, raw, name, *words, at="step 1:", then=stop(place, name))
    assert done.returncode != 0
    assert re.search(text, done.stderr), done.stderr[-3000:]


@pytest.mark.slow  # waits for its limits
@pytest.mark.parametrize(
    ("name", "what", "text"),
    [
        (
            "suspended",
            "os.kill(os.getpid(), signal.SIGSTOP)",
            r"rank 0: a silent rank. Last heartbeat: rank 1, .*"
            r"This rank waits in the checkpoint. run.stall_seconds",
        ),
        ("killed-in-save", "os.kill(os.getpid(), signal.SIGKILL)", r"\(exitcode: -9\)|Signal 9"),
        ("slow-disk", "time.sleep(25)", ""),
    ],
)
def test_a_rank_lost_in_a_save_is_missed_within_one_limit_but_a_slow_disk_may_take_longer(
    place: Path, name: str, what: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SHUTDOWN, "3")
    raw = [*TORCHRUN, "--nproc_per_node=2", "-m", "finetune.train"]
    words = [*RUN, "schedule.steps=2", "schedule.warmup_steps=0", "run.stall_seconds=10"]
    done = start(place, raw, name, *words, site=IN_SAVE.format(what=what))
    saved = place / "runs" / name / "checkpoints" / "step-000002"
    if not text:
        assert done.returncode == 0, done.stderr[-3000:]
        assert saved.exists()
        return
    assert done.returncode != 0
    assert re.search(text, done.stderr), done.stderr[-3000:]
    assert not saved.exists()
    failure = json.loads((place / "runs" / name / "logs" / "failure-0000.json").read_text())
    assert failure["kind"] == ("lost" if name == "killed-in-save" else "stall"), failure


@pytest.mark.slow  # waits for its limit
def test_the_doctor_says_why_a_real_run_hung(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHUTDOWN, "20")
    raw = [*TORCHRUN, "--nproc_per_node=2", "-m", "finetune.train"]
    words = [*RUN, "schedule.steps=200", "checkpoint.every_steps=0", "data.tokens_per_pack=128"]
    words += ["data.packs_per_step=2", "run.stall_seconds=15", "data.stall_seconds=0"]
    done = start(place, raw, "hangs", *words, at="step 1:", then=_stopped_worker(place, "hangs"))
    assert re.search(r"rank 0: collective stall: step \d+ has been stuck for 15 s", done.stderr), done.stderr[-3000:]
    doctor = subprocess.run(
        [*TRAIN[:-1], "doctor", "runs/hangs"],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert doctor.returncode == 3, doctor.stderr
    page = doctor.stdout
    assert re.search(r"rank 0 on \S+ ended first \(stall\): collective stall", page), page
    assert re.search(r"rank 1 is in step \d+, waiting for data; .*; its samples: .*part-000000.tar", page), page
    assert re.search(
        r"rank 0 waits in all_reduce .* called by require_no_wish \(collectives.py:\d+\), number (\d+) of gloo group 0 "
        r"\(default_pg\), which rank 1 did not join: the last one there was .*, number \d+",
        page,
    ), page
    assert re.search(r"rank 1, stack, innermost first:\n.*\n", page), page


def test_ranks_that_do_not_meet_say_so_within_the_limit(place: Path) -> None:
    alone = ["RANK=0", "LOCAL_RANK=0", "WORLD_SIZE=2", "LOCAL_WORLD_SIZE=1", "MASTER_ADDR=127.0.0.1", "MASTER_PORT=0"]
    command = ["env", *alone, sys.executable, "-m", "finetune.train"]
    done = start(place, command, "alone", *RUN, "run.stall_seconds=4")
    assert done.returncode != 0
    words = (
        r"rank 0: the ranks have not come together within 4 s at the start of the run: some are missing, .*Last heartb"
    )
    assert re.search(words, done.stderr), done.stderr[-3000:]
    failure = json.loads((place / "runs" / "alone" / "logs" / "failure-0000.json").read_text())
    assert failure["kind"] == "stall"


def test_ctrl_c_ends_every_process(place: Path) -> None:
    pids: list[int] = []

    def press(pid: int) -> None:
        pids.extend(beat(place, "interrupted", rank)["pid"] for rank in (0, 1))
        os.kill(pid, signal.SIGINT)

    done = start(place, [*TRAIN, "--ranks", "2"], "interrupted", *RUN, at="loaded:", then=press)
    assert done.returncode == 130
    assert not (place / "runs" / "interrupted" / "lock.json").exists()
    for rank in (0, 1):  # the ranks end themselves; torchrun would end them 30 s later
        assert "Ctrl-C: the rank ends now" in (place / f"runs/interrupted/logs/rank-{rank:04d}.log").read_text()
    assert done.stderr == "moetune train: interrupted; the same command continues from the last save\n"
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


# --- without processes ------------------------------------------------------------------------------------------------


class Clock:
    """A clock that the test moves, so that a slow test on a busy machine does not look like a silent rank."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    monotonic = time

    def goes_on(self, seconds: float) -> None:
        self.now += seconds
        time.sleep(0.02)  # two files written within one tick of the kernel have the same time


def test_the_next_rank_is_silent_if_it_stops_writing_but_not_if_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("finetune.ranks.heartbeats.time", clock)
    monkeypatch.setenv("WORLD_SIZE", "3")
    here = {"step": 4, "stage": "evaluation", "samples": [], "collective": None, "busy": False}
    logs = [RankLog(tmp_path / "logs", rank) for rank in (0, 2)]
    Heartbeats(logs[0], limit=4.0).write(here)  # of an earlier start
    first, last = (Heartbeats(log, limit=4.0) for log in logs)
    last.write(here)
    clock.goes_on(5.0)
    assert last.silent_rank() == ""
    first.write(here | {"busy": True})
    assert last.silent_rank() == ""
    assert last.another_works()
    clock.goes_on(5.0)
    assert re.fullmatch(r"rank 0, \S+: step 4, evaluation, 5 s ago", last.silent_rank())
    assert not last.another_works()
    last.add_silence(10.0)  # the rank itself was suspended
    assert last.silent_rank() == ""
    last.add_silence(-10.0)
    first.write(here | {"stage": "ended"})
    assert last.silent_rank() == ""
    clock.goes_on(5.0)
    assert last.silent_rank() == ""
    first.write(here)
    assert last.silent_rank() == ""
    clock.goes_on(5.0)
    assert last.silent_rank()
    for log in logs:
        log.close()
    shutil.rmtree(tmp_path / "logs")  # a rank that cannot write does not judge others
    last.write(here)
    assert last.silent_rank() == ""


def test_the_earliest_failure_is_the_cause_but_never_a_lost_rank(tmp_path: Path) -> None:
    """The failure of rank 3 belongs to an earlier start, regardless of its time."""
    for rank, when, kind in ((0, 1.0, "lost"), (1, 3.0, "failed"), (2, 2.0, "stall"), (3, 0.5, "failed")):
        start = f"host 29500 - {'earlier' if rank == 3 else 'now'} 0"
        failure = Failure(rank=rank, host="h", time=100 + when, kind=kind, message=f"of {rank}", start=start)  # type: ignore[arg-type]
        (tmp_path / f"failure-{rank:04d}.json").write_text(json.dumps(vars(failure)))
    (tmp_path / "failure-0004.json").write_text('{"rank": 4, "ho')
    for named in ("now", "host 29500 - now 0"):
        first = first_failure(tmp_path, start=named)
        assert first is not None
        assert (first.rank, first.code) == (2, 1)
    assert first_failure(tmp_path, start="later") is None


@pytest.mark.parametrize(
    ("rank", "words"),
    [(0, "rank 0: rank 2 on far failed first: of 2"), (1, ""), (2, "rank 2: of 2"), (3, "")],
)
def test_one_rank_of_each_machine_prints_the_cause(
    rank: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetune.ranks.failures.FAILED_S", 0.0)
    monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    log = RankLog(tmp_path, rank)
    failures = [
        Failure(rank=one, host="far" if one > 1 else "near", time=when, kind="stall", message=f"of {one}", start="now")
        for one, when in ((0, 3.0), (1, 4.0), (2, 1.0), (3, 2.0))
    ]
    for failure in failures:
        write_failure(tmp_path, failure)
    tell(log, failures[rank], failures[rank].message)
    log.close()
    assert capsys.readouterr().err == (f"moetune train, {words}\n" if words else "")


def test_an_outcome_belongs_to_its_start_and_is_written_even_if_the_logs_were_removed(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "now")
    log = RankLog(tmp_path / "logs", 0)
    shutil.rmtree(tmp_path / "logs")
    keep_outcome(log, "preempted", 3)
    log.close()
    assert (outcome_of(log.folder, "now"), outcome_of(log.folder, "later")) == ("preempted", "")
    for text in ("", "[]", "{}", '{"outcome": "done", "start": 5}', "\udcff"):
        (tmp_path / "logs" / "outcome.json").write_text(text, errors="surrogateescape")
        assert outcome_of(log.folder, "now") == ""


def test_a_log_on_a_full_disk_neither_ends_a_run_nor_hides_the_reason(tmp_path: Path, capsys) -> None:
    """Write to /dev/full, which fails like a full disk, and to a folder, which cannot hold text."""
    (tmp_path / "rank-0000.log").symlink_to("/dev/full")
    (tmp_path / "failure-0000.json").mkdir()
    log = RankLog(tmp_path, 0)
    log("step 0")
    log("step 1")
    failure = report_failure(log, OSError(28, "No space left on device", "shard-00000.safetensors"))
    log.close()
    assert failure.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert sum("rank-0000.log cannot be written: [Errno 28]" in line for line in lines) == 1
    assert "moetune train, rank 0: [Errno 28] No space left on device: 'shard-00000.safetensors'." in lines


@pytest.mark.parametrize(
    ("code", "kinds", "says", "wanted"),
    [
        (-9, {0: "lost"}, "torchrun was ended by SIGKILL, and its ranks with it", 1),
        (1, {0: "interrupted", 1: "lost"}, "rank 0 failed first: of 0", 130),
        (1, {0: "lost"}, "a rank ended without a message; {logs}/launcher.log has what it and torchrun wrote", 1),
        (1, {0: "input"}, "moetune train: of 0\n", 2),
        (1, {0: "lost", 1: "killed"}, "rank 1 failed first: of 1\nIts log: {logs}/rank-0001.log\n", 1),
        (0, {}, "ended by a signal before it could save", 75),
    ],
)
def test_the_last_sentence_is_the_reason(
    tmp_path: Path, code: int, kinds: dict[int, Kind], says: str, wanted: int, capsys
) -> None:
    for rank, kind in kinds.items():
        failure = Failure(rank=rank, host="h", time=1.0 - rank, kind=kind, message=f"of {rank}", start="- now 0")
        (tmp_path / f"failure-{rank:04d}.json").write_text(json.dumps(vars(failure)))
    assert verdict(code, [], logs=tmp_path, run_id="now", leaves_outcome=True) == wanted
    assert says.format(logs=tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("outcome", "code", "wanted", "says"),
    [
        ("guarded", 1, 76, "a guard stopped the run. Raise its bound, and the same command continues\n"),
        ("preempted", 1, 75, "preempted; run the same command again to continue\n"),
        ("done", 0, 0, ""),
    ],
)
def test_the_exit_code_of_torchrun_becomes_that_of_the_outcome(
    tmp_path: Path, outcome: Outcome, code: int, wanted: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "now")
    log = RankLog(tmp_path, 0)
    keep_outcome(log, outcome, 3)
    log.close()
    assert verdict(code, [], logs=tmp_path, run_id="now", leaves_outcome=True) == wanted
    assert capsys.readouterr().err.removeprefix("moetune train: ") == says


def test_a_full_disk_is_the_reason_if_no_rank_could_write_one(tmp_path: Path, capsys) -> None:
    (tmp_path / "room").symlink_to("/dev/full")
    assert verdict(1, [], logs=tmp_path, run_id="now", leaves_outcome=True) == 1
    assert "could not write why: [Errno 28] No space left on device" in capsys.readouterr().err


def test_idle_steps_stop_the_run() -> None:
    idle = IdleSteps(3)
    for step, loss in enumerate((0.0, 0.0, 1e-30, 0.0, 0.0)):
        idle.see(step, loss, ["a/b/c"])
    with pytest.raises(ValueError, match=r"steps 3 to 5: .*3 steps in a row \(run.idle_steps\).*this rank: a/b/c"):
        idle.see(5, 0.0, ["a/b/c"])
    with pytest.raises(RuntimeError, match=r"step 4: loss is nan, loss_z is inf; the weights are those of the step"):
        require_finite({"loss": float("nan"), "loss_balance": 1.0, "loss_z": float("inf")}, 4)
    assert RunConfig().run.stall_seconds > RunConfig().data.stall_seconds  # so that a rank without data reports first


def test_a_folder_without_rows_is_not_a_saved_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no rows/ in it. Name the folder in which a stopped run saved"):
        saved_rows(tmp_path)


def test_a_step_without_supervised_tokens_does_not_call_the_engine() -> None:
    announced = list[str]()
    step = Step(
        epoch=0,
        step=3,
        batches=(),
        sums=LossSums(),
        bad=(),
        notes=(),
        tokens=7,
        images=0,
        video_seconds=0.0,
        wait_seconds=0.0,
    )
    result = take_step(
        None, step, RunConfig(), None, 3, torch.device("cpu"), lambda _, what, __: announced.append(what)
    )
    assert result == ({"loss": 0.0, "grad_norm": 0.0}, None, [])
    assert announced == ["the sums before the first forward"]


def test_escape_sequences_in_messages_are_shown_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RankLog(tmp_path, 0)
    log.terminal = sys.stderr
    log("left out: sample \x1b[2Ja")
    log.shout("sample \x1b[2Jb")
    log.close()
    assert main(["check", "tiny-cpu", "data.\x1b[2Jc=1"]) == 2
    shown = capsys.readouterr()
    for text in (log.path.read_text(), shown.out + shown.err):
        assert "\x1b" not in text
        assert "sample \\x1b[2Ja" in text
        assert "sample \\x1b[2Jb" in text
    assert "data.\\x1b[2Jc = 1" in shown.err
