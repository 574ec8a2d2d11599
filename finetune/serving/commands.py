"""The command of each server for a folder as it was trained: flags, limits, and the reason why a server cannot.

A flag says only what the folder's own files do not. Loads no torch before an adapter is opened.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from data.config import DataConfig, VideoConfig
from finetune.adapters.keys import CONFIG, WEIGHTS
from finetune.adapters.media import MediaRules, rules_of, trained_data, trained_rules
from finetune.adapters.merge_plan import recorded_context
from finetune.adapters.provenance import base_of, seen_settings
from finetune.adapters.source import AdapterSource, open_source
from finetune.architecture.families import Family
from finetune.architecture.shapes import parameter_shapes, part_of
from finetune.architecture.yarn import Extension, extended_rope, vllm_rope
from finetune.files.hub import model_folder
from finetune.files.hubconfig import read_family

ServerName = Literal["vllm", "sglang", "transformers"]
SERVERS: tuple[ServerName, ...] = ("vllm", "sglang", "transformers")
"""In the order in which the first that is installed is started."""
_PACKAGES = {"sglang": ("sglang",), "transformers": ("transformers", "torchvision")}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's --max-lora-rank accepts."""
_VISION = {"vision_blocks", "merger", "deepstack_mergers"}


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model folder, with an adapter on it or without, and what of it a server must be told."""

    model: Path
    adapter: AdapterSource | None
    name: str
    family: Family
    context: Extension | None
    """How the adapter was trained to read longer contexts; a merged folder's config.json says it itself."""
    data: DataConfig | None
    """How media were prepared in training, where the adapter says so."""

    @property
    def length(self) -> int:
        """Return the longest context that it reads."""
        return self.context.length if self.context else self.family.text.max_position_embeddings

    @property
    def rank(self) -> int:
        """Return the highest rank of the adapter's changes."""
        assert self.adapter is not None
        return max(change.r for change in self.adapter.changes.values())

    def rules(self) -> MediaRules:
        """Return the rules of images and videos that the server must follow: those of training, if they are known."""
        return rules_of(self.model) if self.data is None else trained_rules(self.model, self.data)

    def limits(self) -> MediaRules | None:
        """Return the rules of images and videos that the folder's own files do not say; None where they say all."""
        rules = self.rules()
        return rules if rules_of(self.model).differences(rules) else None


def find_served(folder: Path, adapter: Path | None = None, *, name: str) -> Served:
    """Return what a run's folder, a model's folder or an adapter's folder holds to be served."""
    if adapter is None and (folder / "adapter" / WEIGHTS).is_file():
        adapter = folder / "adapter"
    elif adapter is None and (folder / CONFIG).is_file():
        adapter = folder
    if adapter is None:
        model = folder / "model" if (folder / "model" / "config.json").is_file() else folder
        if not (model / "config.json").is_file():
            raise ValueError(
                f"{folder} is neither a run with an adapter or a model, nor a model folder, nor an adapter's; give one"
            )
        return Served(
            model=model_folder(str(model)), adapter=None, name=name, family=read_family(model), context=None, data=None
        )
    source = open_source(adapter)
    named = base_of(source.metadata)
    if (folder / "config.json").is_file():
        model = folder
    elif named is not None:
        model = model_folder(named.name)
    else:
        raise ValueError(
            f"{adapter} does not say which base it was trained on; give both: serve BASE --adapter {adapter}"
        )
    source = open_source(adapter, parameter_shapes(read_family(model)))
    seen = seen_settings(source.metadata)
    return Served(
        model=model,
        adapter=source,
        name=name,
        family=read_family(model),
        context=recorded_context(source, model),
        data=trained_data(seen, f"the configuration in {adapter}") if "data" in seen else None,
    )


def held_out(folder: Path) -> list[str]:
    """Return the held-out sources of a run, as NAME=PATH; none for a run without them, or for another folder."""
    if not (folder / "config.yaml").is_file():
        return []
    sources = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "eval.sources") or {}
    return [f"{name}={source['path']}" for name, source in sources.items()]


def is_installed(server: ServerName) -> bool:
    """Say whether a server can be started here: the program `vllm`, or the packages of this Python."""
    if server == "vllm":
        return shutil.which("vllm") is not None
    return all(find_spec(package) is not None for package in _PACKAGES[server])


def obstacles(served: Served, server: ServerName) -> list[str]:
    """Return why a server cannot take this adapter as it is; merged, it can."""
    adapter = served.adapter
    if adapter is None or server == "transformers":
        return []
    problems = []
    if adapter.full:
        problems.append(f"{server} takes no tensor in full, and the adapter holds {len(adapter.full)}")
    parts = {part_of(name) for name in adapter.changes}
    if "router" in parts:
        problems.append(f"it is not proved that {server} computes an adapter on routers")
    if server == "vllm" and "vision_blocks" in parts and served.family.text.experts:
        problems.append("vllm 0.32 leaves out an adapter on the tower's attn.qkv if the model has experts")
    if server == "sglang" and served.context is not None:
        problems.append("sglang reads the context from config.json, and the base's is not extended")
    if server == "sglang" and parts & _VISION:
        problems.append("sglang takes no adapter on the vision tower or its mergers")
    return problems


def command(
    served: Served,
    server: ServerName,
    *,
    port: int,
    length: int | None = None,
    dtype: str = "auto",
    more: Mapping[str, str] | None = None,
) -> list[str]:
    """Return the words that start a server; `more` are further flags, by name."""
    words = {"vllm": _vllm, "sglang": _sglang, "transformers": _transformers}[server](served, length or served.length)
    words += ["--port", str(port)]
    words += ["--dtype", dtype] if dtype != "auto" else []
    for flag, value in (more or {}).items():
        words += [f"--{flag}", value] if value else [f"--{flag}"]
    return words


def _vllm(served: Served, length: int) -> list[str]:
    words = ["vllm", "serve", str(served.model), "--served-model-name"]
    words += [served.name if served.adapter is None else f"{served.name}-base", "--max-model-len", str(length)]
    words += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]  # else it refuses requests with tools
    if served.context is not None:
        words += ["--hf-overrides", json.dumps(_longer(served))]
    if (frames := _frames(served.rules())) != _frames(VideoConfig()):
        words += ["--media-io-kwargs", json.dumps({"video": frames})]  # its loader does not read the folder's rules
    if limits := served.limits():
        words += ["--mm-processor-kwargs", json.dumps(_processor_settings(limits))]
    if served.adapter is None:
        return words
    rank = next((size for size in RANKS if size >= served.rank), served.rank)
    words += ["--enable-lora", "--max-lora-rank", str(rank)]
    if {part_of(name) for name in served.adapter.changes} & _VISION:
        words.append("--enable-tower-connector-lora")
    return [*words, "--lora-modules", f"{served.name}={served.adapter.folder}"]


def _longer(served: Served) -> dict[str, Any]:
    """Return what config.json must say instead, for the context that the adapter was trained on."""
    rope = vllm_rope(extended_rope(served.family.text.rope, served.context))
    return {"text_config": {"rope_parameters": rope, "max_position_embeddings": served.length}}


def _processor_settings(limits: MediaRules) -> dict[str, Any]:
    """Return the limits as arguments of the model's own processor."""
    image, video = limits.image_pixels, limits.video_pixels
    return {
        "images_kwargs": {"size": {"shortest_edge": image[0], "longest_edge": image[1]}},
        "videos_kwargs": {"size": {"shortest_edge": video[0], "longest_edge": video[1]}, **_frames(limits)},
    }


def _frames(rules: MediaRules | VideoConfig) -> dict[str, float]:
    """Return the rules by which frames are chosen."""
    return {"fps": rules.fps, "min_frames": rules.min_frames, "max_frames": rules.max_frames}


def _sglang(served: Served, length: int) -> list[str]:
    words = ["python", "-m", "sglang.launch_server", "--model-path", str(served.model)]
    words += ["--served-model-name", served.name, "--context-length", str(length), "--tool-call-parser", "qwen"]
    if limits := served.limits():
        settings = _processor_settings(limits)
        modalities = {"image": settings["images_kwargs"], "video": settings["videos_kwargs"]}
        words += ["--mm-process-config", json.dumps(modalities)]
    if served.adapter is None:
        return words
    words += ["--enable-lora", "--max-lora-rank", str(served.rank)]
    return [*words, "--lora-paths", f"{served.name}={served.adapter.folder}"]


def _transformers(served: Served, length: int) -> list[str]:
    """Stock transformers and PEFT behind our small endpoint, which has no limit of its own on the context."""
    words = ["python", "-m", "finetune.serving.stock", str(served.model), "--served-model-name", served.name]
    if served.context is not None:
        words += ["--overrides", json.dumps(_longer(served))]
    if limits := served.limits():
        words += ["--processor", json.dumps(_processor_settings(limits))]
    if served.adapter is not None:
        words += ["--adapter", str(served.adapter.folder)]
    return words
