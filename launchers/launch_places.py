"""Checks the places of a cluster that `moetune launch` can see: the paths of a recipe, or a profile's mounts."""

from collections.abc import Iterator, Sequence
from contextlib import chdir
from pathlib import Path, PurePosixPath

from finetune.config import RunConfig
from finetune.settings.problems import ConfigError, Problem, problem
from launchers.profile import Profile


def place_lines(config: RunConfig, profile: Profile, *, starts: bool) -> list[str]:
    """Return a warning for each place that the job would not find; raise them all if it `starts` now."""
    problems = list(_unmounted(config, profile) if _has_own_disks(profile) else _on_these_disks(config, profile))
    errors = sum(wrong.level == "error" for wrong in problems)
    if starts and errors:
        raise ConfigError(problems, f"that {'keeps' if errors == 1 else 'keep'} the job from running")
    return [f"warning: {wrong}" for wrong in problems]


def _has_own_disks(profile: Profile) -> bool:
    """Say whether ranks see the disks of a container, whose paths mean nothing here."""
    return profile.kind == "kubernetes" or (profile.kind == "slurm" and bool(profile.slurm.container.image))


def _on_these_disks(config: RunConfig, profile: Profile) -> Sequence[Problem]:
    from finetune.preflight.start import place_problems

    workdir = Path(profile.workdir or ".")
    if not workdir.is_dir():
        remedy = "Name a folder that this machine and the nodes share"
        return [problem("workdir", profile.workdir, "there is no such folder on this machine", remedy)]
    with chdir(workdir):
        return place_problems(config, waits=profile.kind == "slurm")[0]


def _unmounted(config: RunConfig, profile: Profile) -> Iterator[Problem]:
    """Yield a warning for each path of the recipe that lies below no mount: an image may bring it, mounts do not."""
    if profile.kind == "kubernetes":
        key, mounts = "kubernetes.volumes", [volume.mount for volume in profile.kubernetes.volumes.values()]
    else:
        key, mounts = "slurm.container.mounts", [_inside(mount) for mount in profile.slurm.container.mounts]
    for name, path in _paths(config):
        if profile.kind == "slurm" and not path.startswith("/"):
            continue  # below the working directory, without whose mount nothing is rendered
        place = PurePosixPath(profile.workdir or "/", path)
        if not any(place.is_relative_to(mount) for mount in mounts):
            lost = " What a run writes there goes with the container." if name == "run.folder" else ""
            allowed = f"it is {place} in the container, below none of the mounts ({', '.join(mounts) or 'none'})"
            yield problem(
                name, path, allowed, f"Mount it in {key}, or name a path that is.{lost}".rstrip("."), warning=True
            )


def _inside(mount: str) -> str:
    """Return where a mount lies in the container: a path alone has the same name inside."""
    return (mount.split(":") * 2)[1]


def _paths(config: RunConfig) -> Iterator[tuple[str, str]]:
    from finetune.files.hub import may_be_hub_id

    for section, sources in (("data", config.data.sources), ("eval", config.eval.sources)):
        yield from ((f"{section}.sources.{name}.path", source.path) for name, source in sources.items())
    if config.model.path and not may_be_hub_id(config.model.path):
        yield "model.path", config.model.path
    for key, path in {
        "adapters.start_from": config.adapters.start_from,
        "data.media_root": config.data.media_root,
        "data.cache_dir": config.data.cache_dir,
        "run.folder": config.run.folder,
    }.items():
        if path:
            yield key, path
