"""Turns a recipe and a profile into what starts the job: an argument list, a batch script. Pure text."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from uuid import uuid4
from zlib import crc32

from finetune.settings.recipes import encoded_words
from launchers.profile import CPUS_PER_GPU, Profile

SAFE = {
    "PYTHONSAFEPATH": "1",  # a folder `data` where ranks stand is not our package
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # rows differ from step to step, and so would leave holes
}
"""The environment of every rank, unless the profile's says otherwise."""
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Seconds from SIGTERM to SIGKILL. Not --shutdown-timeout, which torch 2.11 refuses; it ignores this, and waits 30."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to start: its recipe with overrides, and its name."""

    recipe: str
    overrides: Sequence[str]
    run: str
    files: Mapping[str, str] = field(default_factory=dict)
    """A recipe of the user's own, and those that it builds on, by their paths below one folder: `recipe` is there."""
    mark: str = field(default_factory=lambda: uuid4().hex[:8])
    """A mark that tells two jobs of one run apart: torchrun's ranks meet under it, and it passes the run's lock on."""

    def words(self, place: str) -> list[str]:
        """Return the words as the training module takes them, where the recipe's files lie in the folder `place`."""
        return [str(PurePath(place, self.recipe)) if self.files else self.recipe, *self.overrides]


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """Files by name, and the command that starts the job when they lie in its folder."""

    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


FIRST_PORT, PORTS = 20_000, 10_000
"""Where nodes meet, by the job's id: two jobs on one node differ, and the kernel hands none of these out by itself."""


def train_words(job: Job, profile: Profile, *, place: str, meet: str = "", start: str = "") -> list[str]:
    """Return the command of one node; `meet` and `start` are shell words already, the caller quotes the rest."""
    words = [profile.python, "-m", "launchers.cli", "train", *job.words(place), f"--ranks={profile.gpus_per_node}"]
    if profile.restarts:
        words += [f"--restarts={profile.restarts}"]
    if profile.nodes == 1:
        return words
    words += [f"--nodes={profile.nodes}", f"--meet={meet}", f"--start={start}"]
    words += [f"--min-nodes={profile.min_nodes}"] if profile.min_nodes else []
    return [*words, f"--join-seconds={profile.rendezvous_timeout}"]


def environment_of(profile: Profile) -> dict[str, str]:
    """Return the environment of ranks. With our setting, torch would ignore the profile's under its older name."""
    older = "PYTORCH_CUDA_ALLOC_CONF" in profile.env
    ours = {name: value for name, value in SAFE.items() if not (older and name == "PYTORCH_ALLOC_CONF")}
    if profile.kind != "deepspeed":
        ours |= {SHUTDOWN: str(profile.shutdown_timeout)}
    return ours | profile.env


def render_torchrun(job: Job, profile: Profile, *, place: str) -> Rendered:
    """Return the command of each node; `place` is the folder of the recipe's files."""
    meet = f"{profile.hosts[0]}:{_port(job, profile)}" if profile.hosts else ""
    words = train_words(job, profile, place=place, meet=meet, start=f"{job.run}-{job.mark}")
    notes = [f"Start this same command on each of: {', '.join(profile.hosts)}."] if profile.nodes > 1 else []
    if job.files and profile.nodes > 1:
        notes += [f"Each of them reads {job.words(place)[0]}: keep it on a shared disk, or copy it there."]
    return Rendered(command=words, environment=environment_of(profile), note=" ".join(notes))


def _port(job: Job, profile: Profile) -> int:
    return profile.port or FIRST_PORT + crc32(job.mark.encode()) % PORTS


def render_deepspeed(job: Job, profile: Profile, *, place: str, folder: str) -> Rendered:
    """Return the command of the first node, and the files that it reads in `folder`."""
    environment = environment_of(profile)
    remote = {name: _in_double_quotes(value) for name, value in environment.items()}
    files = {"deepspeed_env": "".join(f"{name}={value}\n" for name, value in remote.items())}
    words = [profile.python, "-m", "deepspeed.launcher.runner", "--master_port", str(_port(job, profile))]
    if profile.hosts:
        files["hostfile"] = "".join(f"{host} slots={profile.gpus_per_node}\n" for host in profile.hosts)
        words += ["--hostfile", f"{folder}/hostfile", "--master_addr", profile.hosts[0]]
    else:  # with a hostfile the launcher would ask ssh even for this machine
        words += ["--num_gpus", str(profile.gpus_per_node)]
    words += ["--module", "finetune.train"]
    # with hosts the launcher joins its words into a line for the other machines' shells, and quotes nothing in it
    ours = job.words(place)
    words += [f"--words={encoded_words(ours)}"] if profile.hosts and _needs_quotes(ours) else ours
    # the launcher forwards only some variables by itself; those of the file it forwards to every node
    return Rendered(command=words, environment={**environment, "DS_ENV_FILE": f"{folder}/deepspeed_env"}, files=files)


def _in_double_quotes(value: str) -> str:
    """Escape what a shell would expand between the double quotes that DeepSpeed's launcher puts around a value."""
    return re.sub(r'([\\"$`])', r"\\\1", value)


def _quoted(word: str) -> str:
    """Return a word for a script: $ is escaped rather than put in single quotes, where it looks like a mistake."""
    return f'"{_in_double_quotes(word)}"' if set("$`") & set(word) else shlex.quote(word)


def _needs_quotes(words: Sequence[str]) -> bool:
    return any(shlex.quote(word) != word for word in words)


def render_slurm(job: Job, profile: Profile, *, folder: str) -> Rendered:
    """Return the batch script, and the recipe beside it; `folder` is where they will lie, an absolute path."""
    cpus = profile.slurm.cpus_per_task or CPUS_PER_GPU * profile.gpus_per_node
    options = {**_options(profile), "job-name": job.run, "cpus-per-task": cpus, "output": f"{folder}/%j.log"}
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH {shlex.quote(f'--{key}={value}')}" for key, value in options.items() if value != ""]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {shlex.quote(option)}" for option in profile.slurm.extra)]
    lines += ["", "# Rendered by `moetune launch`. The job queues itself again when it was preempted.", "set -u"]
    lines += [f"export {name}={_quoted(value)}" for name, value in environment_of(profile).items()]
    if profile.nodes > 1:
        lines += ['head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)']
        lines += [f"port={profile.port or f'$(({FIRST_PORT} + SLURM_JOB_ID % {PORTS}))'}"]
    place = _inside(f"{folder}/recipe", profile, "the recipe") if job.files else ""
    words = " ".join(map(_quoted, train_words(job, profile, place=place, meet="@MEET@", start="@START@")))
    words = words.replace("@MEET@", '"$head:$port"').replace("@START@", '"$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"')
    # without the number srun gives its step one core, since Slurm 22.05
    step = ["srun", "--ntasks-per-node=1", f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1", *_container(profile)]
    script = "\n".join([*lines, "", f"{' '.join(map(_quoted, step))} {words} &", _TO_THE_END])
    files = {"job.sbatch": script, **{f"recipe/{name}": text for name, text in job.files.items()}}
    return Rendered(command=["sbatch", f"{folder}/job.sbatch"], files=files)


_TO_THE_END = """\
step=$!
# the warning goes to every node's command, which hands it to its ranks: they save, and end
trap 'scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
# 75: another start goes on from the checkpoint. Any other error would come again; for a lost node Slurm itself requeues
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def _options(profile: Profile) -> dict[str, object]:
    slurm = profile.slurm
    return {
        "job-name": "",
        "nodes": profile.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": profile.gpus_per_node,
        "cpus-per-task": "",
        "mem": slurm.mem,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
        "signal": f"B:USR1@{slurm.warning_seconds}",
        "chdir": profile.workdir,
        "open-mode": "append",
    }


def _container(profile: Profile) -> list[str]:
    container = profile.slurm.container
    if not container.image:
        return []
    workdir = _inside(profile.workdir, profile, "workdir")
    if container.runtime == "apptainer":
        binds = [f"--bind={mount}" for mount in container.mounts]
        return ["apptainer", "exec", "--nv", *binds, f"--pwd={workdir}", container.image]
    mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    return [f"--container-image={container.image}", *mounts, f"--container-workdir={workdir}"]


def _inside(path: str, profile: Profile, name: str) -> str:
    """Return where a folder of the nodes lies in the container."""
    container = profile.slurm.container
    if not container.image:
        return path
    for mount in container.mounts:
        outside, inside = (mount.split(":") * 2)[:2]  # a path alone has the same name inside
        if PurePath(path).is_relative_to(outside):
            return str(PurePath(inside, PurePath(path).relative_to(outside)))
    raise ValueError(
        f"{name} lies in {path}, which the container does not see: slurm.container.mounts is "
        f"{', '.join(container.mounts) or 'empty'}. Mount that folder, or set `workdir` and --out inside of a mount"
    )


def shell_line(rendered: Rendered) -> str:
    """Return the command as one would type it."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in rendered.environment.items()]
    return " ".join([*settings, *(shlex.quote(word) for word in rendered.command)])


def as_json(rendered: Rendered) -> str:
    """Return what was rendered for programs."""
    return json.dumps(asdict(rendered))
