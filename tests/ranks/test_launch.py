"""Profiles and what is rendered from them: golden files, quoting, secrets, and deepspeed's own launcher for real."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import oracle
import pytest
import yaml
from limits import LIMIT_S
from places import GOLDEN, ROOT
from starts import environment, start_rendered, toy_run
from torch.distributed.launcher.api import LaunchConfig

from finetune.settings.recipes import decoded_words, load_recipe
from launchers.cli import main
from launchers.launch import render
from launchers.manifest import kubernetes_name
from launchers.profile import read_profile
from launchers.render import SHUTDOWN, Job, shell_line
from launchers.train import rank_environment

JOB = Job(
    recipe="qwen3-vl-235b-a22b-lora",
    overrides=["model.path=/models/my base", "data.sources.general.path=/data/it's/{000..099}.tar", "run.name=a b's"],
    run="a b's",
    mark="5e1f00d5",
)
OWN = {
    "recipes/charts.yaml": "base: ../common.yaml  # ours\ndata: {tokens_per_pack: 8192}\n",
    "common.yaml": "base: qwen3-vl-235b-a22b-lora\n",
}
OWN_JOB = replace(JOB, recipe="recipes/charts.yaml", files=OWN)
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
    job = JOB if name == "torchrun" else OWN_JOB
    rendered = render(job, _profile(tmp_path, PROFILES[name]), folder=Path("/shared/runs/x/launch"))
    parts = [shell_line(rendered), *(f"--- {file}\n{text}" for file, text in rendered.files.items())]
    return "\n".join([*parts, rendered.note]).rstrip() + "\n"


@pytest.mark.parametrize("name", PROFILES)
def test_what_is_rendered_is_what_it_was(name: str, tmp_path: Path) -> None:
    """Compare with the golden files. RENEW=1 python -m pytest tests/ranks/test_launch.py renews them."""
    path = GOLDEN / f"launch-{name}.txt"
    text = _text(name, tmp_path)
    if os.environ.get("RENEW"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("kind", ["torchrun", "kubernetes"])
def test_two_jobs_of_one_run_are_two_starts(kind: str, tmp_path: Path) -> None:
    """Else the second would count as a restart of the first, which may take its folder over."""
    jobs = [Job(recipe="tiny-cpu", overrides=[], run="charts") for _ in range(2)]
    texts = [str(render(job, _profile(tmp_path, PROFILES[kind]), folder=Path("/x"))) for job in jobs]
    first, second = (re.search(r"--start=charts-(\w{8})\b", text)[1] for text in texts)  # type: ignore[index]
    assert first != second


def test_torchrun_reads_how_long_ranks_may_take_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    if "shutdown_timeout" not in {one.name for one in fields(LaunchConfig)}:
        pytest.skip("torchrun of this torch has no such setting")
    monkeypatch.setenv(SHUTDOWN, "7")
    assert LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1).shutdown_timeout == 7


@pytest.mark.parametrize(
    ("ended", "requeued"), [(75, ["requeue 1234567"]), (0, []), (1, []), (2, []), (76, []), (130, [])]
)
def test_the_batch_script_hands_every_word_over_whole_and_queues_again_what_was_preempted(
    tmp_path: Path, ended: int, requeued: list[str]
) -> None:
    """srun, scontrol and scancel stand in as small programs that write down what they are given."""
    tree = PROFILES["slurm"] | {"workdir": str(tmp_path)}
    tree["slurm"] = {"container": {"image": "/images/moetune.sqsh", "mounts": [str(tmp_path)]}}
    profile = _profile(tmp_path, tree)
    script = render(JOB, profile, folder=Path("/x")).files["job.sbatch"]
    tools, seen, calls = tmp_path / "bin", tmp_path / "seen", tmp_path / "calls"
    tools.mkdir()
    calls.touch()
    bodies = {
        "srun": f'printf \'%s\\n\' "$NOTE" "$@" > {seen}; exit {ended}',
        "scontrol": f'if [ "$1" = show ]; then echo first; echo second; else echo "$@" >> {calls}; fi',
        "scancel": "true",
    }
    for name, body in bodies.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    (tmp_path / "job.sbatch").write_text(script)
    slurm = {"SLURM_JOB_ID": "1234567", "SLURM_RESTART_COUNT": "2", "SLURM_JOB_NODELIST": "n"}
    environment = os.environ | slurm | {"PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "job.sbatch"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == ended, done.stderr
    words = seen.read_text().splitlines()
    assert words[0] == 'it\'s "quoted" $HOME'
    first = words.index("train") + 1
    assert words[first : first + 4] == JOB.words("")
    assert "--meet=first:24567" in words
    assert "--start=1234567-2" in words
    assert calls.read_text().splitlines() == requeued


ALLOC, OLDER = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"


@pytest.mark.parametrize("kind", ["torchrun", "deepspeed"])
def test_memory_of_ranks_grows_by_segments_unless_the_user_says_otherwise(kind: str, tmp_path: Path) -> None:
    def rendered(**env: str) -> dict[str, str]:
        return dict(render(JOB, _profile(tmp_path, {"kind": kind, "env": env}), folder=Path("/x")).environment)

    for given in (rendered, lambda **env: rank_environment(env)):
        assert given()[ALLOC] == "expandable_segments:True"
        assert given(**{ALLOC: "max_split_size_mb:64"})[ALLOC] == "max_split_size_mb:64"
        older = given(**{OLDER: "max_split_size_mb:64"})
        assert (older.get(ALLOC), older[OLDER]) == (None, "max_split_size_mb:64")


def test_kubernetes_gets_words_and_a_name_that_it_takes(tmp_path: Path) -> None:
    job = Job(recipe="tiny-cpu", overrides=["run.name=$(HOME)"], run="My_Run 1")
    manifest = yaml.safe_load(
        render(job, _profile(tmp_path, PROFILES["kubernetes"]), folder=Path("/x")).files["job.yaml"]
    )
    assert manifest["metadata"]["name"] == "my-run-1" == kubernetes_name("My_Run 1")
    spec = manifest["spec"]["pytorchReplicaSpecs"]
    assert (spec["Master"]["replicas"], spec["Worker"]["replicas"]) == (1, 7)
    container = spec["Worker"]["template"]["spec"]["containers"][0]
    assert "run.name=$$(HOME)" in container["command"]  # or Kubernetes would fill it in
    assert "--meet=$(MASTER_ADDR):$(MASTER_PORT)" in container["command"]
    assert (
        spec["Worker"]["restartPolicy"] == "ExitCode"
    )  # the operator starts again what exits above 127, and nothing else
    assert "--preempted-code=143" in container["command"]
    assert container["resources"] == {"requests": {"cpu": "96"}, "limits": {"nvidia.com/gpu": "8"}}
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
    assert f"sbatch {tmp_path}/runs/tiny-cpu/launch/job.sbatch" in capsys.readouterr().out
    assert Path("runs/tiny-cpu/launch/job.sbatch").exists()
    assert main(["launch", "tiny-cpu", "--on", "c.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["command"][0] == "sbatch"
    monkeypatch.setenv("PATH", str(tmp_path))
    toy_run(tmp_path)
    words = ["launch", "tiny-cpu", "--on", "c.yaml", "--run", "model.path=base"]
    assert main([*words, "data.sources.general.path=rows.jsonl"]) == 2
    assert "sbatch is not on this machine" in capsys.readouterr().err


def test_a_launch_says_which_places_its_job_would_not_find(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    toy_run(tmp_path / "work")
    words = ["launch", "tiny-cpu", "--on", "c.yaml", "model.path=base", "data.sources.general.path=rows.jsonl"]
    Path("c.yaml").write_text(yaml.safe_dump({"kind": "slurm", "gpus_per_node": 2, "workdir": f"{tmp_path}/work"}))
    assert main(words) == 0
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "work" / "rows.jsonl").unlink()
    assert main(words) == 0
    missing = f"data.sources.general.path = 'rows.jsonl': there is no such file or folder in {tmp_path}/work"
    assert f"warning: {missing}" in capsys.readouterr().err
    assert main([*words, "--run"]) == 2
    assert f"1 problem that keeps the job from running:\n  {missing}" in capsys.readouterr().err
    Path("c.yaml").write_text(yaml.safe_dump({"kind": "deepspeed", "gpus_per_node": 2, "workdir": "/nowhere"}))
    assert main([*words, "--run"]) == 2
    assert "workdir = '/nowhere': there is no such folder on this machine" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["kubernetes", "slurm"])
def test_of_a_container_only_the_mounts_are_looked_at(kind: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    volumes = {"a": {"claim": "a", "mount": "/data"}}
    container = {"image": "i", "mounts": ["/lustre/a:/data:ro", str(tmp_path)]}
    section = {"image": "i", "volumes": volumes} if kind == "kubernetes" else {"container": container}
    Path("c.yaml").write_text(yaml.safe_dump({"kind": kind, "gpus_per_node": 2, kind: section}))
    words = ["launch", "tiny-cpu", "--on", "c.yaml", "--json", "data.sources.general.path=/data/a"]
    words += [f"--out={tmp_path}/job"]
    assert main([*words, "model.path=owner/name", "run.folder=/data"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main([*words, "model.path=/databases/b", "run.folder=/runs"]) == 0
    base, folder = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert base.startswith("warning: model.path = '/databases/b': it is /databases/b in the container, below none of")
    assert f"Mount it in {kind}." in base
    assert "What a run writes there goes with the container." in folder


@pytest.mark.slow  # a start of its own
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
    done = start_rendered(render(job, profile, folder=Path("launch")), tmp_path)
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
    folder = Path("/shared/project/runs/x/launch")
    assert "train" in str(render(OWN_JOB, profile, folder=folder))


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


def test_the_files_of_a_job_lie_in_the_folder_of_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slurm.yaml").write_text("kind: slurm\nnodes: 1\ngpus_per_node: 2\n")
    words = ["launch", "tiny-cpu", "--on", str(tmp_path / "slurm.yaml"), f"run.folder={tmp_path}/our runs"]
    assert main(words) == 0
    script = (tmp_path / "our runs" / "tiny-cpu" / "launch" / "job.sbatch").read_text()
    assert f"#SBATCH '--output={tmp_path}/our runs/tiny-cpu/launch/%j.log'" in script


def test_deepspeed_s_remote_shells_change_no_word_and_no_value(tmp_path: Path) -> None:
    """ssh and pdsh stand in as programs that give a shell the line, as on another machine, and print its words."""
    words = ["data.sources.general.path=/d/{000..012}.tar", "a;touch</f>PWNED", "$HOME it's [a, b] %h `date`"]
    env = {"NOTE": 'it\'s "quoted" $HOME `date` \\', "PLAIN": "1"}
    tree = {"kind": "deepspeed", "nodes": 2, "hosts": ["a", "b"], "gpus_per_node": 2, "env": env}
    rendered = render(Job(recipe="r", overrides=words, run="r"), _profile(tmp_path, tree), folder=tmp_path)
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
    """Ranks that start on several machines are announced to torchrun; else they would meet at an earlier address."""
    assert "launchers.cli" in str(render(JOB, _profile(tmp_path, PROFILES[kind]), folder=Path("/x")))
    assert rank_environment({})["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_two_jobs_on_one_machine_meet_at_two_ports(tmp_path: Path) -> None:
    jobs = [replace(JOB, mark=mark) for mark in ("5e1f00d5", "5e1f00d6")]
    for kind in ("torchrun", "deepspeed"):
        free, fixed = (_profile(tmp_path, PROFILES[kind] | {"port": port}) for port in (0, 29_500))
        first, second = (" ".join(render(job, free, folder=Path("/x")).command) for job in jobs)
        ports = [int(re.search(r"(?:node-a:|master_port )(\d+)", text)[1]) for text in (first, second)]  # type: ignore[index]
        assert len(set(ports)) == 2
        assert all(20_000 <= port < 30_000 for port in ports)
        assert "29500" in " ".join(render(jobs[0], fixed, folder=Path("/x")).command)
    assert (
        '--meet="$head:$port"'
        in render(JOB, _profile(tmp_path, PROFILES["slurm"]), folder=Path("/x")).files["job.sbatch"]
    )
    slurm = _profile(tmp_path, PROFILES["slurm"] | {"port": 29_500})
    assert "port=29500\n" in render(JOB, slurm, folder=Path("/x")).files["job.sbatch"]


def test_an_own_recipe_reaches_the_job_with_all_that_it_builds_on(tmp_path: Path, monkeypatch, capsys) -> None:
    """The files land as Slurm's job and as a pod would see them, far from here, and are read there."""
    home, there = tmp_path / "home", tmp_path / "there"
    (home / "recipes").mkdir(parents=True)
    (home / "recipes" / "charts.yaml").write_text("base: ../common.yaml  # ours\ndata: {tokens_per_pack: 8192}\n")
    (home / "common.yaml").write_text("base: tiny-cpu\nparallel: {ep: 1}\n")
    monkeypatch.chdir(home / "recipes")
    for kind in ("slurm", "kubernetes"):
        Path("c.yaml").write_text(yaml.safe_dump({"kind": kind, "gpus_per_node": 2, "kubernetes": {"image": "x"}}))
        assert main(["launch", "charts.yaml", "--on", "c.yaml", "--out", str(there / kind)]) == 0, (
            capsys.readouterr().err
        )
    script = (there / "slurm" / "job.sbatch").read_text()
    (path,) = re.findall(r"launchers.cli train (\S+)", script)
    assert f"#SBATCH --chdir={home / 'recipes'}\n" in script
    assert f"#SBATCH --output={there / 'slurm' / '%j.log'}\n" in script
    maps, job = yaml.safe_load_all((there / "kubernetes" / "job.yaml").read_text())
    pod = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    volume = next(volume["configMap"] for volume in pod["volumes"] if "configMap" in volume)
    assert volume["name"] == maps["metadata"]["name"]
    (mount,) = (mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "recipe")
    word = pod["containers"][0]["command"][4]
    for item in volume["items"]:
        place = there / "pod" / item["path"]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(maps["data"][item["key"]])
    for recipe in (path, word.replace(mount, str(there / "pod"))):
        config, problems = load_recipe(recipe)
        assert (config.run.name, config.data.tokens_per_pack, config.parallel.ep, problems) == ("charts", 8192, 1, [])
    (home / "common.yaml").write_text(f"base: {home / 'else.yaml'}\n")
    (home / "else.yaml").write_text("base: tiny-cpu\n")
    assert main(["launch", "charts.yaml", "--on", "c.yaml"]) == 2
    assert "else.yaml is an absolute path, but the recipe's files are copied into the job" in capsys.readouterr().err


def test_a_recipe_that_the_container_does_not_see_is_said(tmp_path: Path) -> None:
    container = {"image": "/i.sqsh", "mounts": ["/data:/data", "/shared/home:/home:rw"]}
    profile = _profile(tmp_path, {"kind": "slurm", "workdir": "/data/w", "slurm": {"container": container}})
    rendered = render(OWN_JOB, profile, folder=Path("/shared/home/me/job"))
    assert "launchers.cli train /home/me/job/recipe/recipes/charts.yaml " in rendered.files["job.sbatch"]
    with pytest.raises(ValueError, match="the recipe lies in /elsewhere/recipe, which the container does not see"):
        render(OWN_JOB, profile, folder=Path("/elsewhere"))
    with pytest.raises(ValueError, match="workdir lies in /data2, which the container does not see"):
        render(JOB, replace(profile, workdir="/data2"), folder=Path("/elsewhere"))


@pytest.mark.parametrize(
    ("tree", "remedy"),
    [
        ({"slurm": {"gres": "gpu:8"}}, "Write `gpus_per_node`"),
        ({"slurm": {"cpus": 64}}, "Write `slurm.cpus_per_task`"),
        ({"slurm": {"mem_per_node": "1T"}}, "Write `slurm.mem`"),
        ({"kubernetes": {"nodeSelector": {"gpu": "h100"}}}, "Write `kubernetes.node_selector`"),
        ({"kubernetes": {"volumes": {"a": {"claimName": "a", "mount": "/a"}}}}, "Write `claim`"),
        ({"nodeSelector": {}}, "Write `kubernetes.node_selector`"),
    ],
)
def test_words_of_slurm_and_kubernetes_lead_to_ours(tree: object, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no such key. {re.escape(remedy)}"):
        _profile(tmp_path, tree)


@pytest.mark.parametrize(
    "volumes", [[], ["a"], "/a", 3, {"a": None}, {"a": "/a"}, {"a": ["/a"]}, {"a": {"claim": ["x"]}}]
)
def test_volumes_of_any_other_kind_are_named(volumes: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kubernetes\.volumes.* = "):
        _profile(tmp_path, {"kubernetes": {"image": "x", "volumes": volumes}})


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("nodes", [1, 8])
@pytest.mark.parametrize(
    "container",
    [{}, PROFILES["slurm"]["slurm"]["container"], {"image": "a b.sif", "runtime": "apptainer", "mounts": ["/shared"]}],
)  # type: ignore[index]
def test_shellcheck_accepts_every_batch_script(tmp_path: Path, container: dict, nodes: int, own: bool) -> None:
    tree = PROFILES["slurm"] | {"nodes": nodes}
    tree["slurm"] = tree["slurm"] | {"container": container, "mem": "0", "cpus_per_task": 96}  # type: ignore[operator]
    files = render(OWN_JOB if own else JOB, _profile(tmp_path, tree), folder=Path("/shared/x")).files
    program = Path(sys.executable).with_name("shellcheck")
    if not program.exists():
        pytest.skip("no shellcheck beside Python: `make test` installs the extra `test`, which has it")
    done = subprocess.run([program, "-"], input=files["job.sbatch"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("own", [False, True])
def test_manifests_are_what_the_operator_s_own_models_hold(tmp_path: Path, own: bool) -> None:
    """Read into Kubeflow's and Kubernetes' published classes, which leave out what they do not know, and back."""
    profile = _profile(tmp_path, PROFILES["kubernetes"])
    text = render(OWN_JOB if own else JOB, profile, folder=Path("/x")).files["job.yaml"]
    manifests = list(yaml.safe_load_all(text))
    kinds = {"ConfigMap": "V1ConfigMap", "PyTorchJob": "KubeflowOrgV1PyTorchJob"}
    assert [manifest["kind"] for manifest in manifests] == (["ConfigMap"] if own else []) + ["PyTorchJob"]
    for manifest in manifests:
        assert oracle.ask(oracle.manifest, manifest=manifest, kind=kinds[manifest["kind"]]) == manifest


TOY = [
    "model.path=base",
    "data.sources.general.path=rows.jsonl",
    "data.workers=0",
    "data.packs_per_step=2",
    "parallel.ep=1",
    "schedule.steps=8",
    "checkpoint.every_steps=1",
]


def _two_machines(folder: Path, name: str, *words: str, restarts: int) -> list[subprocess.Popen]:
    """Start what a profile of two machines renders, both on this one."""
    tree = {"nodes": 2, "gpus_per_node": 1, "hosts": ["localhost", "localhost"], "python": sys.executable}
    profile = _profile(folder, tree | {"restarts": restarts})
    rendered = render(
        Job(recipe="tiny-cpu", overrides=[*TOY, f"run.name={name}", *words], run=name), profile, folder=folder
    )
    ours = environment() | dict(rendered.environment)
    machines = []
    for number in range(2):
        with (folder / f"{name}-{number}.out").open("w") as out:
            machines.append(subprocess.Popen(rendered.command, cwd=folder, env=ours, stdout=out, stderr=out))
    return machines


@pytest.mark.slow  # two starts
def test_torchrun_does_not_start_again_what_a_wrong_input_ended(tmp_path: Path) -> None:
    toy_run(tmp_path)
    machines = _two_machines(tmp_path, "wrong", "data.overlong=error", "data.tokens_per_pack=8", restarts=3)
    assert [machine.wait(timeout=LIMIT_S) for machine in machines] == [2, 2]
    assert "has no usable sample" in (tmp_path / "wrong-1.out").read_text()
    logs = [path.read_text() for path in (tmp_path / "runs" / "wrong" / "logs").glob("rank-*.log")]
    assert [text.count("--- data") for text in logs] == [1, 1], "one start, no restart"


@pytest.mark.slow  # three starts
def test_ranks_of_two_machines_start_again_and_a_lost_machine_is_one_that_another_start_cures(tmp_path: Path) -> None:
    toy_run(tmp_path)
    machines = _two_machines(tmp_path, "killed", restarts=1)
    os.kill(_rank_in_step(tmp_path, "killed"), signal.SIGKILL)
    assert [machine.wait(timeout=LIMIT_S) for machine in machines] == [0, 0]
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "runs" / "killed" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(8))
    machines = _two_machines(tmp_path, "lost", restarts=0)
    _rank_in_step(tmp_path, "lost")
    machines[1].kill()
    machines[1].wait()
    assert machines[0].wait(timeout=LIMIT_S) == 75
    assert "a machine was lost; another start continues from the last save" in (tmp_path / "lost-0.out").read_text()


def _rank_in_step(folder: Path, name: str) -> int:
    """Wait for the first step of a run, and return the process of a rank."""
    run = folder / "runs" / name
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        time.sleep(0.1)
    return json.loads((run / "logs" / "rank-0001.json").read_text())["pid"]
