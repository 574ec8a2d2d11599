"""Profiles and what is rendered from them: golden files, quoting, secrets, and deepspeed's own launcher for real."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from limits import LIMIT_S
from places import GOLDEN, ROOT
from starts import start_rendered, toy_run
from torch.distributed.launcher.api import LaunchConfig

from finetune.settings.recipes import decoded_words
from launchers.cli import main
from launchers.profile import read_profile
from launchers.render import SHUTDOWN, Job, kubernetes_name, render, shell_line
from launchers.train import rank_environment

JOB = Job(
    recipe="qwen3-vl-235b-a22b-lora",
    overrides=["model.path=/models/my base", "data.sources.general.path=/data/it's/{000..099}.tar", "run.name=a b's"],
    run="a b's",
    mark="5e1f00d5",
)
PROFILES = {
    "torchrun": {
        "kind": "torchrun",
        "nodes": 2,
        "hosts": ["node-a", "node-b"],
        "restarts": 3,
        "min_nodes": 1,
        "env": {"NCCL_SOCKET_IFNAME": "eth0"},
    },
    "deepspeed": {
        "kind": "deepspeed",
        "nodes": 2,
        "hosts": ["node-a", "node-b"],
        "env": {"HF_HOME": "/shared/hf cache"},
    },
    "slurm": {
        "kind": "slurm",
        "nodes": 8,
        "workdir": "/shared/my project",
        "restarts": 1,
        "slurm": {
            "partition": "gpu",
            "account": "lab",
            "time": "2-00:00:00",
            "extra": ["--exclusive"],
            "container": {"image": "/images/moetune.sqsh", "mounts": ["/shared:/shared", "/scratch:/scratch"]},
        },
        "env": {"NCCL_IB_HCA": "mlx5", "NOTE": 'it\'s "quoted" $HOME'},
    },
    "kubernetes": {
        "kind": "kubernetes",
        "nodes": 8,
        "restarts": 3,
        "workdir": "/work",
        "env": {"NCCL_DEBUG": "WARN"},
        "kubernetes": {
            "namespace": "research",
            "image": "registry.example/moetune:1",
            "shm": "128Gi",
            "cpus": "96",
            "volumes": {"data": {"claim": "datasets", "mount": "/data"}, "runs": {"claim": "runs", "mount": "/work"}},
            "secrets": {"WANDB_API_KEY": "wandb/api-key"},
            "node_selector": {"gpu": "h100"},
        },
    },
}


def _profile(tmp_path: Path, tree: object):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(tree))
    return read_profile(path)


def _text(name: str, tmp_path: Path) -> str:
    rendered = render(JOB, _profile(tmp_path, PROFILES[name]), folder="runs/x/launch")
    parts = [shell_line(rendered), *(f"--- {file}\n{text}" for file, text in rendered.files.items())]
    return "\n".join([*parts, rendered.note]).rstrip() + "\n"


@pytest.mark.parametrize("name", PROFILES)
def test_what_is_rendered_is_what_it_was(name: str, tmp_path: Path) -> None:
    """To renew after a wanted change: RENEW=1 python -m pytest tests/ranks/test_launch.py, and read the diff."""
    path = GOLDEN / f"launch-{name}.txt"
    text = _text(name, tmp_path)
    if os.environ.get("RENEW"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("kind", ["torchrun", "kubernetes"])
def test_two_jobs_of_one_run_are_two_starts(kind: str, tmp_path: Path) -> None:
    """Else the second would count as a restart of the first, which may take its folder over."""
    jobs = [Job(recipe="tiny-cpu", overrides=[], run="charts") for _ in range(2)]
    texts = [str(render(job, _profile(tmp_path, PROFILES[kind]), folder="x")) for job in jobs]
    first, second = (re.search(r"--rdzv_id=charts-(\w{8})\b", text)[1] for text in texts)  # type: ignore[index]
    assert first != second


def test_torchrun_reads_how_long_ranks_may_take_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    if "shutdown_timeout" not in {one.name for one in fields(LaunchConfig)}:
        pytest.skip("torchrun of this torch has no such setting")
    monkeypatch.setenv(SHUTDOWN, "7")
    assert LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1).shutdown_timeout == 7


def test_the_batch_script_is_shell_and_hands_every_word_over_whole(tmp_path: Path) -> None:
    """srun, scontrol and scancel stand in as small programs that write down what they are given."""
    profile = _profile(tmp_path, PROFILES["slurm"] | {"workdir": str(tmp_path)})
    script = render(JOB, profile, folder="x").files["job.sbatch"]
    tools, seen = tmp_path / "bin", tmp_path / "seen"
    tools.mkdir()
    outcome = shlex.quote(str(tmp_path / "runs" / JOB.run / "logs" / "outcome.json"))
    bodies = {
        "srun": f'printf \'%s\\n\' "$NOTE" "$@" > {seen}; sleep 1.1; mkdir -p "$(dirname {outcome})"; '
        f'echo \'{{"outcome": "preempted"}}\' > {outcome}; exit 1',
        "scontrol": f'if [ "$1" = show ]; then echo first; echo second; else echo "$@" > {tmp_path}/requeued; fi',
        "scancel": "true",
    }
    for name, body in bodies.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    (tmp_path / "job.sbatch").write_text(script)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "n",
    }
    done = subprocess.run(["bash", "job.sbatch"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    words = seen.read_text().splitlines()
    assert words[0] == 'it\'s "quoted" $HOME'
    assert words[-len(JOB.words) :] == JOB.words
    assert "--rdzv_endpoint=first:29500" in words
    assert "--rdzv_id=77" in words
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"


ALLOC, OLDER = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"


@pytest.mark.parametrize("kind", ["torchrun", "deepspeed"])
def test_memory_of_ranks_grows_by_segments_unless_the_user_says_otherwise(kind: str, tmp_path: Path) -> None:
    def rendered(**env: str) -> dict[str, str]:
        return dict(render(JOB, _profile(tmp_path, {"kind": kind, "env": env}), folder="x").environment)

    for given in (rendered, lambda **env: rank_environment(env)):
        assert given()[ALLOC] == "expandable_segments:True"
        assert given(**{ALLOC: "max_split_size_mb:64"})[ALLOC] == "max_split_size_mb:64"
        older = given(**{OLDER: "max_split_size_mb:64"})
        assert (older.get(ALLOC), older[OLDER]) == (None, "max_split_size_mb:64")


def test_kubernetes_gets_words_and_a_name_that_it_takes(tmp_path: Path) -> None:
    job = Job(recipe="tiny-cpu", overrides=["run.name=$(HOME)"], run="My_Run 1")
    manifest = yaml.safe_load(render(job, _profile(tmp_path, PROFILES["kubernetes"]), folder="x").files["job.yaml"])
    assert manifest["metadata"]["name"] == "my-run-1" == kubernetes_name("My_Run 1")
    spec = manifest["spec"]["pytorchReplicaSpecs"]
    assert (spec["Master"]["replicas"], spec["Worker"]["replicas"]) == (1, 7)
    container = spec["Worker"]["template"]["spec"]["containers"][0]
    assert container["command"][-1] == "run.name=$$(HOME)"  # or Kubernetes would fill it in
    key = next(entry for entry in container["env"] if entry["name"] == "WANDB_API_KEY")
    assert key["valueFrom"] == {"secretKeyRef": {"name": "wandb", "key": "api-key"}}
    assert kubernetes_name("!!") == "run"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "ray"}, "kind = 'ray'"),
        ({"nodes": 0}, "it must be at least 1"),
        ({"nodes": 2, "min_nodes": 3, "hosts": ["a", "b"]}, "more than nodes, 2"),
        ({"nodes": 2}, "2 nodes need as many hosts"),
        ({"env": {"WANDB_API_KEY": "s3cret"}}, "what looks like a secret would be written into files"),
        ({"kind": "deepspeed", "env": {"HF_TOKEN": "s3cret"}}, "Log in once on every node"),
        ({"kind": "kubernetes"}, "a pod needs an image"),
        ({"kind": "kubernetes", "kubernetes": {"image": "x", "secrets": {"A": "b"}}}, "it must be secret/key"),
        ({"partition": "gpu"}, "no such key"),
        ("torchrun", "no such key"),
    ],
)
def test_profiles_are_checked(tree: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        _profile(tmp_path, tree)
    assert "s3cret" not in str(caught.value)


def test_a_profile_that_is_no_yaml_is_said(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not readable as YAML"):
        read_profile(tmp_path / "p.yaml")


def test_the_command_checks_the_recipe_for_the_profile_s_ranks(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(yaml.safe_dump({"nodes": 1, "gpus_per_node": 3}))
    assert main(["launch", "tiny-cpu", "--on", "c.yaml"]) == 2
    assert "it must divide the number of ranks, 3" in capsys.readouterr().err
    Path("c.yaml").write_text(yaml.safe_dump({"kind": "slurm", "gpus_per_node": 2}))
    assert main(["launch", "tiny-cpu", "--on", "c.yaml"]) == 0
    assert "sbatch runs/tiny-cpu/launch/job.sbatch" in capsys.readouterr().out
    assert Path("runs/tiny-cpu/launch/job.sbatch").exists()
    assert main(["launch", "tiny-cpu", "--on", "c.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["command"][0] == "sbatch"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "tiny-cpu", "--on", "c.yaml", "--run"]) == 2
    assert "sbatch is not on this machine" in capsys.readouterr().err


def test_deepspeed_s_own_launcher_runs_what_was_rendered(tmp_path: Path) -> None:
    toy_run(tmp_path)
    profile = _profile(tmp_path, {"kind": "deepspeed", "gpus_per_node": 2, "python": sys.executable})
    words = [
        "model.path=base",
        "data.sources.general.path=rows.jsonl",
        "model.dtype=float32",
        "data.workers=0",
        "schedule.steps=2",
        "run.name=by deepspeed",
        "data.packs_per_step=2",
        "parallel.ep=auto",
        "parallel.recompute=auto",
    ]
    job = Job(recipe="tiny-cpu", overrides=words, run="by deepspeed")
    done = start_rendered(render(job, profile, folder="launch"), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = (tmp_path / "runs" / "by deepspeed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [0, 1]
    foreseen = json.loads((tmp_path / "runs" / "by deepspeed" / "plan.json").read_text())
    assert foreseen["layout"]["ep"] in (1, 2)
    assert foreseen["layout"]["recompute"] in ("none", "selective", "layer")
    weights = foreseen["measured"]["weights_held"]
    assert weights == pytest.approx(foreseen["foreseen"]["weights_held"][0], rel=0.05)


def _pages(mark: str) -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "clusters.md").read_text()
    return re.findall(rf"```yaml\n# {mark}: (\S+)\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize(("name", "text"), _pages("profile"))
def test_profiles_in_docs_render(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    profile = read_profile(tmp_path / name)
    assert "finetune.train" in str(render(JOB, profile, folder="x"))


@pytest.mark.parametrize(("name", "text"), _pages("recipe"))
def test_recipes_in_docs_are_sound_and_planned(name: str, text: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert main(["check", str(path), "--ranks", "8"]) == 0, capsys.readouterr().err
    assert main(["plan", str(path), "--gpus", "8", "--gpu", "h200-141gb"]) == 0, capsys.readouterr().out


EVIL = "x\ntouch PWNED #"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "slurm", "slurm": {"partition": EVIL}}, "slurm.partition = .* must be one line of printable"),
        ({"kind": "slurm", "slurm": {"extra": ["--exclusive", EVIL]}}, "slurm.extra = .* must be one line"),
        ({"kind": "slurm", "slurm": {"container": {"image": EVIL}}}, "slurm.container.image = .* must be one line"),
        ({"kind": "slurm", "env": {"A=1; touch PWNED; B": "1"}}, "env = 'A=1; .* a variable's name has letters"),
        ({"kind": "torchrun", "env": {"A": "1\nB=2"}}, "env.A = .* must be one line"),
        ({"kind": "torchrun", "workdir": "/a\x1b[2J"}, "workdir = .* must be one line"),
    ],
)
def test_no_text_of_a_profile_becomes_shell_code(tmp_path: Path, tree: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _profile(tmp_path, tree)


def test_no_name_of_a_run_becomes_shell_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slurm.yaml").write_text("kind: slurm\nnodes: 1\ngpus_per_node: 2\n")
    words = ["launch", "tiny-cpu", "--on", str(tmp_path / "slurm.yaml"), 'run.name="x\\ntouch PWNED #"']
    assert main([*words, "--out", str(tmp_path / "job")]) == 2
    assert "run.name = 'x\\ntouch PWNED #': it must be one line of printable characters" in capsys.readouterr().err
    assert not (tmp_path / "job").exists()


def test_the_folder_of_runs_is_where_a_job_looks_for_its_outcome(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slurm.yaml").write_text("kind: slurm\nnodes: 1\ngpus_per_node: 2\n")
    words = ["launch", "tiny-cpu", "--on", str(tmp_path / "slurm.yaml"), f"run.folder={tmp_path}/our runs"]
    assert main(words) == 0
    script = (tmp_path / "our runs" / "tiny-cpu" / "launch" / "job.sbatch").read_text()
    assert f"outcome='{tmp_path}/our runs/tiny-cpu/logs/outcome.json'" in script


def test_deepspeed_s_remote_shells_change_no_word_and_no_value(tmp_path: Path) -> None:
    """ssh and pdsh stand in as programs that give a shell the line, as on another machine, and print its words."""
    words = ["data.sources.general.path=/d/{000..012}.tar", "a;touch</f>PWNED", "$HOME it's [a, b] %h `date`"]
    env = {"NOTE": 'it\'s "quoted" $HOME `date` \\', "PLAIN": "1"}
    tree = {"kind": "deepspeed", "nodes": 2, "hosts": ["a", "b"], "gpus_per_node": 2, "env": env}
    rendered = render(Job(recipe="r", overrides=words, run="r"), _profile(tmp_path, tree), folder=str(tmp_path))
    for name, text in rendered.files.items():
        (tmp_path / name).write_text(text)
    tools = tmp_path / "bin"
    tools.mkdir()
    show = f"s#{sys.executable}#printf '%s\\\\n' \"$NOTE\"#"
    bodies = {
        "ssh": "echo a",
        "pdsh": f'while [ "$1" != -w ]; do shift; done; shift 2; sh -c "$(printf %s "$*" | sed {shlex.quote(show)})"',
    }
    for name, body in bodies.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    environment = os.environ | dict(rendered.environment) | {"PATH": f"{tools}:{os.environ['PATH']}"}
    command = [sys.executable, *rendered.command[1:]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert env["NOTE"] in lines
    (last,) = [line for line in lines if line.startswith("--words=")]
    assert decoded_words(last.removeprefix("--words=")) == ["r", *words]
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("kind", ["torchrun", "slurm", "kubernetes"])
def test_a_restart_on_several_machines_has_a_store_of_its_own(kind: str, tmp_path: Path) -> None:
    store = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    several = render(JOB, _profile(tmp_path, PROFILES[kind] | {"nodes": 2, "hosts": ["a", "b"]}), folder="x")
    assert store in str(several)
    assert store not in str(render(JOB, _profile(tmp_path, PROFILES[kind] | {"nodes": 1, "min_nodes": 0}), folder="x"))
