"""Finds the folder of a model: a local one, or a hub id through huggingface_hub and its cache."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

# Copies of the weights for other frameworks; a model folder needs none of these files.
_UNNEEDED = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "original/*"]
_NEEDED = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def model_folder(
    model: str,
    *,
    revision: str | None = None,
    cache: Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """Return the folder of `model`: a local path, or a hub id such as Qwen/Qwen3-VL-30B-A3B-Instruct, which is fetched.

    Let one process per host call this first; the others then find the model in the cache.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"model.revision {revision!r} does not apply to the local folder {path}; leave it out")
        return require_files(path)
    if path.exists() or not may_be_hub_id(model):
        raise ValueError(
            f"model.path: {path} is not a folder; give a folder with a config.json, or a hub id (owner/name)"
        )
    return require_files(_fetch(model, revision, cache, endpoint))


def lasting_name(model: str) -> str:
    """Return a name of a model that means the same in any folder: a hub id as it is, a local folder's absolute path."""
    path = Path(model).expanduser()
    return str(path.absolute()) if path.is_dir() else model


def may_be_hub_id(model: str) -> bool:
    """Say whether a model that is not a folder here may be one on the hub."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))


def cached_folder(model: str, *, cache: Path | None = None) -> Path | None:
    """Return the folder of a hub id in the cache, whole or in part; None where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, cache_dir=cache, local_files_only=True, ignore_patterns=_UNNEEDED))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def require_on_hub(model: str, *, endpoint: str | None = None) -> None:
    """Raise the error of `model_folder` unless the hub would give us this id; downloads its config.json only."""
    from huggingface_hub import constants

    if not _answers(endpoint or constants.ENDPOINT):  # the library would try for half a minute
        raise ValueError(_unreachable(f"model.path: {model}", Path(constants.HF_HUB_CACHE), model))
    _fetch(model, None, None, endpoint, looks_only=True)


def _answers(endpoint: str, *, timeout: float = 2.0) -> bool:
    """Say whether a server takes connections; one behind a proxy is not asked."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    parts = urlsplit(endpoint)
    if parts.scheme in getproxies():
        return True
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with suppress(OSError), socket.create_connection((parts.hostname or "", port), timeout=timeout):
        return True
    return False


def _unreachable(named: str, where: Path, model: str) -> str:
    from huggingface_hub import constants

    return (
        f"{named} is not in the cache {where}, and the hub cannot be reached"
        f"{' (HF_HUB_OFFLINE is set)' if constants.HF_HUB_OFFLINE else ''}. Run `hf download {model}` on a machine "
        f"with network access and set HF_HOME to that cache, or give a local folder"
    )


def require_files(folder: Path) -> Path:
    """Return `folder` if it has all files that a model folder needs; else raise one error that names all missing."""
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    vocabulary = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not vocabulary and not (folder / "tokenizer.json").is_file():
        missing.append("tokenizer.json (or vocab.json and merges.txt)")
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}; a model folder needs the small files of the hub repository next to "
            f"its weights. Copy them from the model's repository"
        )
    return folder


def _fetch(
    model: str, revision: str | None, cache: Path | None, endpoint: str | None, *, looks_only: bool = False
) -> Path:
    """Download the model, or its config.json alone to see that the hub has it."""
    from tempfile import TemporaryDirectory

    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = f"model.path: {model}" + (f" at revision {revision}" if revision else "")
    where = cache or Path(constants.HF_HUB_CACHE)
    try:
        if looks_only:  # not into the cache, where a file alone would look like a model in part
            with TemporaryDirectory() as aside:
                return Path(hf_hub_download(model, "config.json", cache_dir=aside, endpoint=endpoint))
        folder = snapshot_download(
            model, revision=revision, cache_dir=cache, endpoint=endpoint, ignore_patterns=_UNNEEDED
        )
    except HFValidationError as error:
        raise ValueError(f"{named} is neither a local folder nor a hub id (owner/name): {error}") from error
    except GatedRepoError as error:
        raise ValueError(
            f"{named} is gated: accept its terms on the hub's page, then log in here with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{named} is neither a local folder nor a model that you can see on the hub: check the spelling, and for a "
            f"private model, log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{named}: the hub has the model but not this revision; check model.revision") from error
    except IncompleteSnapshotError as error:
        lacks = str(error).partition("incomplete: ")[2].partition(". ")[0]
        raise ValueError(
            f"{named} is in the cache {where} only in part ({lacks}), and the hub cannot be reached to complete it. "
            f"Run `hf download {model}` on a machine with network access, or give a complete local folder"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(_unreachable(named, where, model)) from error
    except HfHubHTTPError as error:
        raise ValueError(f"{named} could not be fetched from the hub: {error}") from error
    return Path(folder)
