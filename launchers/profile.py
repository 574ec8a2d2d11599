"""The facts of one cluster, in one YAML file: how jobs start there, on what, and with which environment.

Recipes say what is trained, profiles where. Nothing in a profile is secret: secrets are named, never written.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from finetune.settings.problems import ConfigError, Problem, problem
from finetune.settings.typed import TypedTree

CPUS_PER_GPU = 8
"""CPU cores that a job asks for beside each GPU, where the profile names no number: a rank, and its readers."""


@dataclass(frozen=True, kw_only=True)
class ContainerProfile:
    """The image that ranks run in; none where it is empty."""

    image: str = ""
    mounts: list[str] = field(default_factory=list)  # outside:inside
    runtime: Literal["pyxis", "apptainer"] = "pyxis"


@dataclass(frozen=True, kw_only=True)
class SlurmProfile:
    """The options of a Slurm job."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = "24:00:00"
    cpus_per_task: int = 0  # CPU cores of a node, all for its one task; 0: eight for each GPU
    mem: str = ""  # memory of a node, as 900G; 0 is all of it. Empty: the partition's default
    warning_seconds: int = 300  # before the end: time for a checkpoint; the job then queues itself again
    extra: list[str] = field(default_factory=list)  # further options, such as --exclusive
    container: ContainerProfile = field(default_factory=ContainerProfile)


@dataclass(frozen=True, kw_only=True)
class VolumeProfile:
    """A claim, and where it is mounted."""

    claim: str
    mount: str


@dataclass(frozen=True, kw_only=True)
class KubernetesProfile:
    """The options of a PyTorchJob."""

    namespace: str = "default"
    image: str = ""
    volumes: dict[str, VolumeProfile] = field(default_factory=dict)
    shm: str = "64Gi"  # readers hand samples over in shared memory
    cpus: str = ""  # requested for each pod; empty: eight for each GPU
    memory: str = ""  # requested for each pod, and its limit, which counts what lies in `shm`; empty: none
    resource: str = "nvidia.com/gpu"
    service_account: str = ""
    node_selector: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)  # variable: secret/key, as WANDB_API_KEY: wandb/api-key


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One cluster."""

    kind: Literal["torchrun", "deepspeed", "slurm", "kubernetes"] = "torchrun"
    nodes: int = 1
    gpus_per_node: int = 8
    python: str = "python"  # on the nodes
    workdir: str = ""  # the working directory of ranks, where relative paths begin; Slurm: empty is where launch runs
    hosts: list[str] = field(default_factory=list)  # of torchrun (the first is where ranks meet) and deepspeed
    port: int = 0  # where nodes meet; 0: one from 20000 to 29999 that follows from the job's id
    restarts: int = 0  # how often torchrun starts all ranks again when one fails, from the last checkpoint
    min_nodes: int = 0  # a restart goes on with fewer than `nodes` when at least this many are there; 0: all
    rendezvous_timeout: int = 900  # seconds to wait for all nodes
    shutdown_timeout: int = 120  # seconds for a last checkpoint; with torch 2.11 always 30
    env: dict[str, str] = field(default_factory=dict)
    slurm: SlurmProfile = field(default_factory=SlurmProfile)
    kubernetes: KubernetesProfile = field(default_factory=KubernetesProfile)

    @property
    def ranks(self) -> int:
        """Return the number of ranks of the job."""
        return self.nodes * self.gpus_per_node


SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")


def read_profile(path: Path) -> Profile:
    """Read and check the profile in a file; raise every problem at once."""
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ValueError(f"profile {path}: not readable as YAML: {error}. See docs/clusters.md for one") from error
    typed = TypedTree(Profile)
    typed.take(tree if isinstance(tree, dict) else {"kind": tree}, path.name)
    profile = typed.finish()
    problems = [*map(_in_our_words, typed.problems)]
    problems += [replace(wrong, source=path.name) for wrong in _problems(profile)]
    if problems:
        raise ConfigError(problems)
    return profile


def _in_our_words(unfit: Problem) -> Problem:
    """Name the key of a profile where a word of Slurm's or Kubernetes' own stands."""
    ours = _THEIR_WORDS.get(unfit.key.rpartition(".")[2].replace("_", "-"))
    return replace(unfit, remedy=f"Write `{ours}`") if ours and unfit.allowed == "no such key" else unfit


def _problems(profile: Profile) -> Iterator[Problem]:
    yield from _unfit_texts(asdict(profile))
    for name in [*profile.env, *profile.kubernetes.secrets]:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            allowed = "a variable's name has letters, digits and _ only, and no digit in front"
            yield problem("env", name, allowed, "Rename it")
    for key, least in _LEAST.items():
        if (value := attrgetter(key)(profile)) < least:
            yield problem(key, value, f"it must be at least {least}", f"Set {key}: {least} or more")
    if profile.min_nodes > profile.nodes:
        allowed = f"more than nodes, {profile.nodes}"
        yield problem("min_nodes", profile.min_nodes, allowed, "Set it lower, or leave it out")
    for name in profile.env:
        if any(word in name.upper() for word in SECRET):
            allowed = "what looks like a secret would be written into files and onto command lines"
            yield problem(f"env.{name}", "(not shown)", allowed, _SECRET_REMEDY[profile.kind])
    if profile.kind in ("torchrun", "deepspeed") and profile.nodes > 1 and len(profile.hosts) != profile.nodes:
        allowed = f"{profile.nodes} nodes need as many hosts"
        yield problem("hosts", profile.hosts, allowed, "List them, the first leads")
    if profile.kind == "kubernetes" and not profile.kubernetes.image:
        yield problem("kubernetes.image", "", "a pod needs an image", "Build one from the Dockerfile and name it here")
    for variable, place in profile.kubernetes.secrets.items():
        if place.count("/") != 1:
            yield problem(f"kubernetes.secrets.{variable}", place, "it must be secret/key", "As wandb/api-key")


def _unfit_texts(values: Mapping[str, Any], above: str = "") -> Iterator[Problem]:
    """Yield texts with line breaks or other control characters, which a batch script would take as lines of its own."""
    for key, value in values.items():
        dotted = f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _unfit_texts(value, f"{dotted}.")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not all(map(str.isprintable, (text, str(key)))):
                yield problem(dotted, text, "it must be one line of printable characters", "Remove the rest")


_LEAST = {
    "nodes": 1,
    "gpus_per_node": 1,
    "port": 0,
    "slurm.cpus_per_task": 0,
    "restarts": 0,
    "min_nodes": 0,
    "rendezvous_timeout": 1,
    "shutdown_timeout": 1,
}
_SECRET_REMEDY = {
    "torchrun": "Export it where the command is started: it is inherited",
    "deepspeed": "Log in once on every node (`wandb login`): deepspeed forwards values on ssh's command line",
    "slurm": "Export it where sbatch is called: Slurm hands the environment on",
    "kubernetes": "Make a secret and name it: kubernetes.secrets.<variable>: <secret>/<key>",
}
_THEIR_WORDS = {
    "chdir": "workdir",
    "constraint": "slurm.extra: [--constraint=...]",
    "container-image": "slurm.container.image",
    "container-mounts": "slurm.container.mounts",
    "cpu": "kubernetes.cpus",
    "cpus": "slurm.cpus_per_task",
    "cpus-per-gpu": "slurm.cpus_per_task",
    "cpus-per-task": "slurm.cpus_per_task",
    "exclude": "slurm.extra: [--exclude=...]",
    "exclusive": "slurm.extra: [--exclusive]",
    "gpus": "gpus_per_node",
    "gpus-per-node": "gpus_per_node",
    "gres": "gpus_per_node",
    "image": "slurm.container.image",
    "limits": "kubernetes.cpus and kubernetes.memory",
    "mem": "kubernetes.memory",
    "mem-per-node": "slurm.mem",
    "memory": "slurm.mem",
    "mountPath": "mount",
    "claimName": "claim",
    "nodeSelector": "kubernetes.node_selector",
    "nodelist": "slurm.extra: [--nodelist=...]",
    "nodes": "nodes",
    "replicas": "nodes",
    "requests": "kubernetes.cpus and kubernetes.memory",
    "reservation": "slurm.extra: [--reservation=...]",
    "resources": "kubernetes.cpus and kubernetes.memory",
    "serviceAccountName": "kubernetes.service_account",
    "workingDir": "workdir",
}
"""Words of Slurm and of a manifest, with the key of a profile that does the same; only unknown keys are looked up."""
