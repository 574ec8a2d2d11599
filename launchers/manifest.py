"""Turns a recipe and a profile into a manifest for Kubernetes: a PyTorchJob, and a ConfigMap of the recipe's files."""

from typing import Any

import yaml

from launchers.profile import CPUS_PER_GPU, Profile
from launchers.render import Job, Rendered, environment_of, train_words

RECIPES = "/etc/moetune"
"""Where a pod finds a recipe of the user's own."""
PREEMPTED = 143
"""The exit code of a preempted pod: the operator starts a pod again if its code is above 127."""


def render_kubernetes(job: Job, profile: Profile, *, folder: str) -> Rendered:
    """Return the manifest; `folder` is where it will lie."""
    name = kubernetes_name(job.run)
    replicas: dict[str, Any] = {"Master": _replica(job, profile, 1)}
    if profile.nodes > 1:
        replicas["Worker"] = _replica(job, profile, profile.nodes - 1)
    training = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name, "namespace": profile.kubernetes.namespace},
        # pods that wait for one that failed for good would hold their GPUs
        "spec": {"runPolicy": {"cleanPodPolicy": "Running"}, "pytorchReplicaSpecs": replicas},
    }
    parts = [*([_config_map(job, profile)] if job.files else []), training]
    text = yaml.safe_dump_all(parts, sort_keys=False, width=1000)
    return Rendered(command=["kubectl", "apply", "-f", f"{folder}/job.yaml"], files={"job.yaml": text})


def _config_map(job: Job, profile: Profile) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{kubernetes_name(job.run)}-recipe", "namespace": profile.kubernetes.namespace},
        "data": dict(zip(_keys(job), job.files.values(), strict=True)),
    }


def _keys(job: Job) -> list[str]:
    """Return names for the recipe's files in a ConfigMap, which takes no paths: those stand where it is mounted."""
    return [f"{place}.yaml" for place in range(len(job.files))]


def _replica(job: Job, profile: Profile, count: int) -> dict[str, Any]:
    kube = profile.kubernetes
    limits = {kube.resource: str(profile.gpus_per_node), "memory": kube.memory}
    requests = {"cpu": kube.cpus or str(CPUS_PER_GPU * profile.gpus_per_node), "memory": kube.memory}
    environment: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in environment_of(profile).items()
    ]
    for variable, place in kube.secrets.items():
        secret, _, key = place.partition("/")
        environment.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    mounts, volumes = _storage(job, profile)
    container: dict[str, Any] = {
        "name": "pytorch",  # the operator looks for this name
        "image": kube.image,
        "command": _pod_words(job, profile),
        "env": environment,
        # no limit of CPU: the kernel would stop readers within it while cores are free
        "resources": {"requests": _given(requests), "limits": _given(limits)},
        "volumeMounts": mounts,
    }
    container |= {"workingDir": profile.workdir} if profile.workdir else {}
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": profile.shutdown_timeout + 30,
        "containers": [container],
        "volumes": volumes,
    }
    pod |= {"serviceAccountName": kube.service_account} if kube.service_account else {}
    pod |= {"nodeSelector": dict(kube.node_selector)} if kube.node_selector else {}
    # a pod that failed by itself fails the job, one that was preempted or lost its node is made again; with OnFailure
    # a wrong input would be tried again and again
    return {"replicas": count, "restartPolicy": "ExitCode", "template": {"spec": pod}}


def _given(amounts: dict[str, Any]) -> dict[str, Any]:
    return {name: amount for name, amount in amounts.items() if amount}


def _storage(job: Job, profile: Profile) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the mounts of a container and the volumes of its pod."""
    kube = profile.kubernetes
    mounts: list[dict[str, Any]] = [{"name": key, "mountPath": volume.mount} for key, volume in kube.volumes.items()]
    volumes: list[dict[str, Any]] = [
        {"name": key, "persistentVolumeClaim": {"claimName": volume.claim}} for key, volume in kube.volumes.items()
    ]
    mounts += [{"name": "shm", "mountPath": "/dev/shm"}]
    volumes += [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": kube.shm}}]
    if job.files:
        items = [{"key": key, "path": path} for key, path in zip(_keys(job), job.files, strict=True)]
        mounts += [{"name": "recipe", "mountPath": RECIPES, "readOnly": True}]
        volumes += [{"name": "recipe", "configMap": {"name": f"{kubernetes_name(job.run)}-recipe", "items": items}}]
    return mounts, volumes


def _pod_words(job: Job, profile: Profile) -> list[str]:
    """Return a pod's command: the operator sets the leader's address and port; Kubernetes fills in $(...)."""
    start = f"{kubernetes_name(job.run)}-{job.mark}"
    words = train_words(job, profile, place=RECIPES, meet="@MEET@", start=start)
    words = [word.replace("$(", "$$(").replace("@MEET@", "$(MASTER_ADDR):$(MASTER_PORT)") for word in words]
    return [*words, f"--preempted-code={PREEMPTED}"]


def kubernetes_name(run: str) -> str:
    """Return a name that Kubernetes takes: small letters, digits and -, at most 50 characters."""
    name = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in run.lower())
    return name.strip("-")[:50].strip("-") or "run"
