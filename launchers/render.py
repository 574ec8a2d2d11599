"""Turns a recipe and a profile into what starts the job: an argument list, a batch script, a manifest. Pure text."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from uuid import uuid4

import yaml

from finetune.settings.recipes import encoded_words
from launchers.profile import Profile

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Signals that torchrun passes on to ranks: schedulers warn with these, and SIGUSR1 would kill it and orphan them."""
SAFE = {
    "PYTHONSAFEPATH": "1",  # a folder `data` where ranks stand is not our package
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # rows differ from step to step, and so would leave holes
}
"""The environment of every rank, unless the profile's says otherwise."""
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""torchrun's one store would hand a restart the addresses of ranks that are gone: one of its own for each start."""
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Seconds from SIGTERM to SIGKILL. Not --shutdown-timeout, which torch 2.11 refuses; it ignores this, and waits 30."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained: the recipe with its overrides, and the run's name."""

    recipe: str
    overrides: Sequence[str]
    run: str
    folder: str = "runs"
    """Where the folder of the run is: `run.folder`."""
    mark: str = field(default_factory=lambda: uuid4().hex[:8])
    """What tells two jobs of one run apart: torchrun's ranks meet under it, and a run's lock is handed on by it."""

    @property
    def words(self) -> list[str]:
        """Return the words as the training module takes them."""
        return [self.recipe, *self.overrides]


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """Files by name, and the command that starts the job when they lie in its folder."""

    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def render(job: Job, profile: Profile, *, folder: str) -> Rendered:
    """Render for the profile's kind; `folder` is where the files will lie."""
    kinds = {"torchrun": _torchrun, "deepspeed": _deepspeed, "slurm": _slurm, "kubernetes": _kubernetes}
    return kinds[profile.kind](job, profile, folder)


def torchrun_words(job: Job, profile: Profile, *, endpoint: str, run_id: str) -> list[str]:
    """Return one node's torchrun; `endpoint` and `run_id` are shell words already, the caller quotes the rest."""
    nodes = f"{profile.min_nodes}:{profile.nodes}" if profile.min_nodes else str(profile.nodes)
    words = [profile.python, "-m", "torch.distributed.run"]
    if profile.nodes == 1:
        words += ["--standalone"]
    else:
        words += [f"--nnodes={nodes}", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", f"--rdzv_id={run_id}"]
        words += [f"--rdzv_conf=join_timeout={profile.rendezvous_timeout},close_timeout={profile.shutdown_timeout}"]
    words += [f"--nproc_per_node={profile.gpus_per_node}", f"--max_restarts={profile.restarts}"]
    words += [f"--signals-to-handle={SIGNALS}"]
    return [*words, "-m", "finetune.train", *job.words]


def _environment(profile: Profile) -> dict[str, str]:
    """Return the environment of ranks. With our setting, torch would ignore the profile's under its older name."""
    older = "PYTORCH_CUDA_ALLOC_CONF" in profile.env
    ours = {name: value for name, value in SAFE.items() if not (older and name == "PYTORCH_ALLOC_CONF")}
    if profile.kind != "deepspeed":
        ours |= {SHUTDOWN: str(profile.shutdown_timeout)} | (OWN_STORE if profile.nodes > 1 else {})
    return ours | profile.env


def _torchrun(job: Job, profile: Profile, folder: str) -> Rendered:
    endpoint = f"{profile.hosts[0]}:{profile.port}" if profile.hosts else ""
    words = torchrun_words(job, profile, endpoint=endpoint, run_id=f"{job.run}-{job.mark}")
    note = f"Start this same command on each of: {', '.join(profile.hosts)}" if profile.nodes > 1 else ""
    return Rendered(command=words, environment=_environment(profile), note=note)


def _deepspeed(job: Job, profile: Profile, folder: str) -> Rendered:
    environment = _environment(profile)
    remote = {name: _in_double_quotes(value) for name, value in environment.items()}
    files = {"deepspeed_env": "".join(f"{name}={value}\n" for name, value in remote.items())}
    words = [profile.python, "-m", "deepspeed.launcher.runner", "--master_port", str(profile.port)]
    if profile.hosts:
        files["hostfile"] = "".join(f"{host} slots={profile.gpus_per_node}\n" for host in profile.hosts)
        words += ["--hostfile", f"{folder}/hostfile", "--master_addr", profile.hosts[0]]
    else:  # with a hostfile the launcher would ask ssh even for this machine
        words += ["--num_gpus", str(profile.gpus_per_node)]
    words += ["--module", "finetune.train"]
    # with hosts the launcher joins its words into a line for the other machines' shells, and quotes nothing in it
    words += [f"--words={encoded_words(job.words)}"] if profile.hosts and _needs_quotes(job.words) else job.words
    # the launcher forwards only some variables by itself; those of the file it forwards to every node
    return Rendered(command=words, environment={**environment, "DS_ENV_FILE": f"{folder}/deepspeed_env"}, files=files)


def _in_double_quotes(value: str) -> str:
    """Escape what a shell would expand between the double quotes that DeepSpeed's launcher puts around a value."""
    return re.sub(r'([\\"$`])', r"\\\1", value)


def _needs_quotes(words: Sequence[str]) -> bool:
    return any(shlex.quote(word) != word for word in words)


def _slurm(job: Job, profile: Profile, folder: str) -> Rendered:
    slurm = profile.slurm
    options = {
        "job-name": job.run,
        "nodes": profile.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": profile.gpus_per_node,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
        "signal": f"B:USR1@{slurm.warning_seconds}",
        "output": f"{folder}/%j.log",
        "open-mode": "append",
    }
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH {shlex.quote(f'--{key}={value}')}" for key, value in options.items() if value != ""]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {shlex.quote(option)}" for option in slurm.extra)]
    lines += ["", "# Rendered by `moetune launch`. The job queues itself again when it was preempted.", "set -u"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in _environment(profile).items()]
    lines += [f"cd {shlex.quote(profile.workdir)}"] if profile.workdir else []
    lines += ['head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)', ""]
    words = torchrun_words(job, profile, endpoint="@HEAD@", run_id="@ID@")
    inner = " ".join(shlex.quote(word) for word in words)
    inner = inner.replace("@HEAD@", f'"$head":{profile.port}').replace("@ID@", '"$SLURM_JOB_ID"')
    step = ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1", *_container(profile)]
    outcome = shlex.quote(f"{job.folder}/{job.run}/logs/outcome.json")
    lines += [
        "started=$(mktemp)",
        f"{' '.join(shlex.quote(word) for word in step)} {inner} &",
        "step=$!",
        "# the warning goes to every node's torchrun, which hands it to its ranks: they save, and end",
        """trap 'scancel --signal=USR1 "$SLURM_JOB_ID"' USR1""",
        "trap 'scancel --signal=TERM \"$SLURM_JOB_ID\"' TERM",
        'wait "$step"',
        "code=$?",
        'while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done',
        f"outcome={outcome}",
        'if [ "$outcome" -nt "$started" ] && grep -q \'"preempted"\' "$outcome"; then code=75; fi',
        'rm -f "$started"',
        'if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$code"',
    ]
    return Rendered(command=["sbatch", f"{folder}/job.sbatch"], files={"job.sbatch": "\n".join(lines) + "\n"})


def _container(profile: Profile) -> list[str]:
    container = profile.slurm.container
    if not container.image:
        return []
    if container.runtime == "apptainer":
        return ["apptainer", "exec", "--nv", *(f"--bind={mount}" for mount in container.mounts), container.image]
    mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    workdir = [f"--container-workdir={profile.workdir}"] if profile.workdir else []
    return [f"--container-image={container.image}", *mounts, *workdir]


def _kubernetes(job: Job, profile: Profile, folder: str) -> Rendered:
    name = kubernetes_name(job.run)
    replicas: dict[str, Any] = {"Master": _replica(job, profile, 1)}
    if profile.nodes > 1:
        replicas["Worker"] = _replica(job, profile, profile.nodes - 1)
    manifest = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name, "namespace": profile.kubernetes.namespace},
        "spec": {
            "nprocPerNode": str(profile.gpus_per_node),
            "runPolicy": {"cleanPodPolicy": "None", "backoffLimit": profile.restarts},
            "pytorchReplicaSpecs": replicas,
        },
    }
    text = yaml.safe_dump(manifest, sort_keys=False, width=1000)
    return Rendered(command=["kubectl", "apply", "-f", f"{folder}/job.yaml"], files={"job.yaml": text})


def _replica(job: Job, profile: Profile, count: int) -> dict[str, Any]:
    kube = profile.kubernetes
    amounts = {kube.resource: profile.gpus_per_node, "cpu": kube.cpus, "memory": kube.memory}
    limits = {key: value for key, value in amounts.items() if value}
    environment: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in _environment(profile).items()
    ]
    for variable, place in kube.secrets.items():
        secret, _, key = place.partition("/")
        environment.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    mounts = [{"name": key, "mountPath": volume.mount} for key, volume in kube.volumes.items()]
    volumes: list[dict[str, Any]] = [
        {"name": key, "persistentVolumeClaim": {"claimName": volume.claim}} for key, volume in kube.volumes.items()
    ]
    container: dict[str, Any] = {
        "name": "pytorch",  # the operator looks for this name
        "image": kube.image,
        "command": _pod_words(job, profile),
        "env": environment,
        "resources": {"limits": limits},
        "volumeMounts": [*mounts, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    container |= {"workingDir": profile.workdir} if profile.workdir else {}
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": profile.shutdown_timeout + 30,
        "containers": [container],
        "volumes": [*volumes, {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": kube.shm}}],
    }
    pod |= {"serviceAccountName": kube.service_account} if kube.service_account else {}
    pod |= {"nodeSelector": dict(kube.node_selector)} if kube.node_selector else {}
    # exit code 75, preempted, is above 128 for no operator: OnFailure starts the pod again whatever it is
    return {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": pod}}


def _pod_words(job: Job, profile: Profile) -> list[str]:
    """Return a pod's command: the operator sets the leader's address and port; Kubernetes fills in $(...)."""
    run_id = f"{kubernetes_name(job.run)}-{job.mark}"
    words = torchrun_words(job, profile, endpoint="$(MASTER_ADDR):$(MASTER_PORT)", run_id=run_id)
    first = len(words) - len(job.words)
    return [*words[:first], *(word.replace("$(", "$$(") for word in words[first:])]


def kubernetes_name(run: str) -> str:
    """Return a name that Kubernetes takes: small letters, digits and -, at most 50 characters."""
    name = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in run.lower())
    return name.strip("-")[:50].strip("-") or "run"


def shell_line(rendered: Rendered) -> str:
    """Return the command as one would type it."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in rendered.environment.items()]
    return " ".join([*settings, *(shlex.quote(word) for word in rendered.command)])


def as_json(rendered: Rendered) -> str:
    """Return what was rendered for programs."""
    return json.dumps(asdict(rendered))
