"""The origin of an adapter in the metadata of its file: base, data, configuration, scores and parent.

Nothing in it depends on the number of ranks, so that every layout writes the same file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from finetune.adapters.keys import WEIGHTS
from finetune.files.basefiles import BaseFiles
from finetune.files.fingerprint import fingerprint

BASE = "moetune.base"
PARENT = "moetune.parent"
CONFIGURATION = "moetune.config"
NOT = "not quantised"
_AGAIN = "another program changed it, or the file is damaged; get the adapter again"
_OF_THE_RANKS = ("parallel", "engine", "checkpoint", "run.name")
"""Parts of a configuration that decide how a run was executed, but not its result."""


SEEN = {
    "data": ("image", "video", "chat"),
    "context": ("yarn",),
    "moe": ("router_float32",),
    "model": ("quantise",),
}
"""Configuration keys that affect a model's answers, by section."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The facts that a run records in the adapter that it writes.

    `data` identifies the samples and their order; `parent` is a `parent_line`.
    """

    base: BaseFiles
    base_name: str
    data: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    parent: str = ""

    def metadata(self) -> dict[str, str]:
        """Return the metadata as strings. The first call reads a few bytes of each base tensor."""
        base = {"name": self.base_name, "fingerprint": fingerprint(self.base)}
        if self.base.quantised:
            base["quantised"] = self.base.quantised
        metadata = {BASE: _json(base)}
        if self.data:
            metadata["moetune.data"] = hashlib.sha256(_json(self.data).encode()).hexdigest()[:32]
        if self.config:
            metadata[CONFIGURATION] = _json(_without(self.config, _OF_THE_RANKS))
        if self.scores:
            metadata["moetune.scores"] = _json(self.scores)
        if self.parent:
            metadata[PARENT] = self.parent
        return metadata


@dataclass(frozen=True, kw_only=True)
class BaseName:
    """The base that an adapter's metadata names, and how its weights were quantised ("" if they were not)."""

    name: str
    fingerprint: str
    quantised: str = ""

    def text(self) -> str:
        """Return the base for a sentence."""
        return f"{self.name}{f', quantised to {self.quantised}' if self.quantised else ''}"


def base_of(metadata: Mapping[str, str]) -> BaseName | None:
    """Return the base that an adapter's metadata names; None for files of other tools."""
    if BASE not in metadata:
        return None
    base = recorded(metadata, BASE)
    if not all(isinstance(base.get(key), str) for key in ("name", "fingerprint")):
        raise ValueError(f"the adapter's metadata {BASE} is {metadata[BASE]!r}, without name and fingerprint: {_AGAIN}")
    return BaseName(name=base["name"], fingerprint=base["fingerprint"], quantised=str(base.get("quantised", "")))


def recorded(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """Return the object under a key of an adapter's metadata; empty if the key is missing."""
    try:
        value = json.loads(metadata.get(key, "{}"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the adapter's metadata {key} is not valid JSON ({error}): {_AGAIN}") from error
    if not isinstance(value, dict):
        raise ValueError(f"the adapter's metadata {key} is {metadata[key][:80]!r}, not an object: {_AGAIN}")
    return value


def seen_settings(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the settings in an adapter's metadata that affect answers (`SEEN`); empty if it has none."""
    config = recorded(metadata, CONFIGURATION)
    return {
        section: {key: config[section][key] for key in keys if key in config[section]}
        for section, keys in SEEN.items()
        if isinstance(config.get(section), dict)
    }


def quantised_in_training(metadata: Mapping[str, str]) -> str:
    """Return how the base was quantised while the adapter trained, such as `experts in nf4`; empty if it was not."""
    forms = seen_settings(metadata).get("model", {}).get("quantise", {})
    listed = forms.items() if isinstance(forms, Mapping) else ()
    return ", ".join(f"{name} in {bits}" for name, bits in listed if bits != "none")


def require_same_base(adapter: Path, metadata: Mapping[str, str], base: BaseFiles) -> str:
    """Raise if the adapter was trained on another base; return what is known about its base, in a sentence."""
    named = base_of(metadata)
    if named is None:
        return f"{adapter} does not say which base it was trained on; only shapes were compared with {base.folder}"
    ours = fingerprint(base)
    if ours != named.fingerprint:
        raise ValueError(
            f"{adapter} was trained on {named.text()} (fingerprint {named.fingerprint}), but {base.folder} is another "
            f"base (fingerprint {ours}{_form(base, named)}) with the same shapes and other values. Give the base it "
            f"was trained on, or --other-base if you mean to use another one"
        )
    return f"{adapter} was trained on this base (fingerprint {ours})"


def other_base_text(metadata: Mapping[str, str], base: BaseFiles) -> str:
    """Return a sentence on an adapter's base where the user asked for another one."""
    named = base_of(metadata)
    text = "merged into another base on purpose"
    if named is None or named.quantised == base.quantised:
        return text
    return f"{text}: it was trained on {named.text()}, and this base is {base.quantised or NOT}"


def _form(base: BaseFiles, named: BaseName) -> str:
    return f", {base.quantised or NOT}" if base.quantised != named.quantised else ""


def parent_line(folder: Path) -> str:
    """Return an adapter's folder and the hash of its weights, for the metadata of adapters derived from it."""
    with (folder / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _json({"folder": str(folder), "sha256": digest})


def versions() -> str:
    """Return the versions of the packages that may affect what an adapter means."""
    names = ("moetune", "peft", "torch", "transformers")
    return _json({name: installed for name in names if (installed := _version(name))})


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # moetune itself, when it runs from its source tree
        return ""


def _without(config: Mapping[str, Any], dropped: tuple[str, ...]) -> dict[str, Any]:
    """A configuration without the sections and keys at the given paths."""
    rest = {section: values for section, values in config.items() if section not in dropped}
    for path in dropped:
        section, _, key = path.partition(".")
        if key and isinstance(rest.get(section), Mapping):
            rest[section] = {name: value for name, value in rest[section].items() if name != key}
    return rest


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
