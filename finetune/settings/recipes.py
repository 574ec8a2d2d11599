"""Turns a recipe's name and `key=value` overrides into a RunConfig. Loads no torch.

Precedence: dataclass defaults < `base:` recipe < the YAML < overrides. All problems are collected, then shown.
"""

import json
import os
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from finetune.architecture.parts import PARTS
from finetune.config import RunConfig
from finetune.settings.problems import Problem, did_you_mean
from finetune.settings.typed import TypedTree

COMMAND_LINE = "command line"


def encoded_words(words: Sequence[str]) -> str:
    """Return a recipe's name and its overrides as one word that no shell changes."""
    return urlsafe_b64encode(json.dumps(list(words)).encode()).decode()


def decoded_words(text: str) -> list[str]:
    """Return the words that `encoded_words` encoded."""
    try:
        words = json.loads(urlsafe_b64decode(text))
    except ValueError as error:
        raise ValueError(f"--words: {text!r:.80} is not text that `moetune launch` wrote") from error
    return [str(word) for word in words]


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in files("configs").iterdir() if entry.name.endswith(".yaml")
    )


def find_recipe(name: str, *, beside: Path = Path()) -> Path:
    """Return the path of a YAML file (relative to `beside`), or of a shipped recipe by its bare name."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = beside / name
        if path.is_file():
            return path
        hint = f" `{path.stem}` alone names the shipped recipe." if path.stem in recipe_names() else ""
        raise ValueError(
            f"recipe {name!r}: {path.absolute()} does not exist.{hint} Shipped recipes: {', '.join(recipe_names())}."
        )
    if name in recipe_names():
        return Path(str(files("configs") / f"{name}.yaml"))
    advice = did_you_mean(name, recipe_names())
    raise ValueError(f"recipe {name!r}: neither a file (its name ends in .yaml) nor a shipped recipe. {advice}")


def recipe_files(name: str) -> tuple[Path, dict[str, str]]:
    """Return the common folder and the texts by path of a recipe's file and of the user's files that it builds on.

    The recipe comes first. Shipped recipes are left out, as every machine has them.
    """
    paths: list[Path] = []
    path = find_recipe(name)
    while path.parent != Path(str(files("configs"))):
        paths.append(Path(os.path.abspath(path)))  # noqa: PTH100  # resolve() would follow links, which `base:` does not
        base = _read_yaml(path).get("base")
        if base is None:
            break
        if Path(str(base)).is_absolute():
            raise ValueError(
                f"{path}: base: {base} is an absolute path, but the recipe's files are copied into the job. Write it "
                f"relative to {path.name}"
            )
        path = find_recipe(str(base), beside=path.parent)
    top = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    return top, {str(path.relative_to(top)): path.read_text() for path in paths}


def load_recipe(
    name: str, overrides: Sequence[str] = (), *, below: tuple[dict[str, Any], str] | None = None
) -> tuple[RunConfig, list[Problem]]:
    """Return the configuration as far as it can be read, and its problems; the default replaces a bad value.

    Without a name, overrides change the defaults. `below` holds values of lower precedence than the recipe's, and their
    source.
    """
    typed = TypedTree(RunConfig)
    if below is not None:
        typed.take(*below)
    layers = _layers(name, typed) if name else []
    for tree, source in layers:
        typed.take(tree, source)
    for override in overrides:
        _take_override(override, typed)
    order = [source for _, source in layers]
    _drop_inherited(typed, order)
    _settle_length(typed, order)
    config = typed.finish()
    if not config.run.name:
        config = replace(config, run=replace(config.run, name=find_recipe(name).stem if name else "run"))
    return config, typed.problems


def effective(config: RunConfig) -> dict[str, Any]:
    """Return every key with its value, as plain containers."""
    tree = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(tree, dict)
    if config.parallel.ep == 0:
        tree["parallel"]["ep"] = "auto"
    return {str(key): value for key, value in tree.items()}


def _layers(name: str, typed: TypedTree[RunConfig]) -> list[tuple[dict[str, Any], str]]:
    """Return the recipe and all recipes that it builds on, the lowest layer first."""
    path = find_recipe(name)
    chain = [path.resolve()]
    layers: list[tuple[dict[str, Any], str]] = []
    while True:
        tree = _read_yaml(path)
        base = tree.pop("base", None)
        layers.insert(0, (tree, path.name))
        if base is None:
            return layers
        try:
            path = find_recipe(str(base), beside=path.parent)
        except ValueError as error:
            typed.report("base", base, str(error).rstrip("."), "Fix the base: line", path.name)
            return layers
        chain.append(path.resolve())
        if chain[-1] in chain[:-1]:
            circle = " -> ".join(step.name for step in chain)
            allowed = f"recipes build on each other in a circle: {circle}"
            typed.report("base", base, allowed, "Remove one of the base: lines", layers[0][1])
            return layers


def _drop_inherited(typed: TypedTree[RunConfig], order: Sequence[str]) -> None:
    """Drop the LoRA settings that a recipe inherits for a part of the model that it freezes or trains in full.

    Settings of the recipe itself, or of higher precedence, stay, so that the user is warned about them.
    """
    for part in PARTS:
        key = f"adapters.{part}"
        section = typed.values.get("adapters", {}).get(part, {})
        mode = section.get("mode", "lora")
        read = {"lora": set(section), "full": {"mode", "lr"}}.get(mode, {"mode"})
        above = order[order.index(typed.sources[f"{key}.mode"]) :] if typed.sources.get(f"{key}.mode") in order else []
        for name in set(section) - read:
            if typed.sources[f"{key}.{name}"] not in (*above, COMMAND_LINE):
                typed.drop(f"{key}.{name}")


def _settle_length(typed: TypedTree[RunConfig], order: Sequence[str]) -> None:
    """Keep either epochs or steps: the one that was set last decides; both in one place are a problem."""
    schedule = typed.values.get("schedule", {})
    steps, epochs = schedule.get("steps", 0), schedule.get("epochs", 0.0)
    if not epochs:
        return
    ranks = {source: rank for rank, source in enumerate([*order, COMMAND_LINE])}
    of_steps, of_epochs = (ranks.get(typed.sources.get(f"schedule.{key}", ""), -1) for key in ("steps", "epochs"))
    if steps and of_steps == of_epochs:
        source = typed.sources["schedule.epochs"]
        allowed = f"schedule.steps is also set, to {steps}, but only one of them can decide the length of the run"
        typed.report("schedule.epochs", epochs, allowed, "Remove one of the two", source)
    if steps and of_steps >= of_epochs:
        typed.drop("schedule.epochs")
    else:
        schedule["steps"] = 0  # known once the data is open


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ValueError(f"recipe {path}: not readable as YAML: {error}. Fix the file.") from error
    if not isinstance(tree, dict):
        raise ValueError(
            f"recipe {path}: it must hold sections with keys, found a {type(tree).__name__}. Write `optim:` ..."
        )
    return {str(key): value for key, value in tree.items()}


def _take_override(text: str, typed: TypedTree[RunConfig]) -> None:
    key, sign, value = text.partition("=")
    if not sign or not all(key.split(".")):
        allowed = "an override must have the form section.key=value"
        typed.report(text, text, allowed, "Write it as in optim.lr=1e-4", COMMAND_LINE)
        return
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
    except (YAMLError, OmegaConfBaseException):
        typed.report(key, value, "the value is not valid YAML", "Close its brackets and quotes", COMMAND_LINE)
        return
    assert isinstance(parsed, dict)
    tree: Any = parsed["value"]
    for word in reversed(key.split(".")):
        tree = {word: tree}
    typed.take(tree, COMMAND_LINE)
