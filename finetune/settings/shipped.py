"""What the shipped recipes are for, and on which hardware: the first line of each says both. Loads no torch."""

import re
from dataclasses import dataclass

from finetune.settings.recipes import find_recipe, recipe_names

_FIRST = re.compile(r"# (?P<purpose>.+) \[(?P<devices>\d+) x (?P<device>\S+)\]")


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """A recipe that comes with the package."""

    name: str
    purpose: str
    devices: int
    device: str
    """A name of `moetune plan --gpu`, or cpu."""

    @property
    def hardware(self) -> str:
        """Return the devices in words."""
        return f"{self.devices} x {self.device}"


def shipped_recipes() -> list[Shipped]:
    """Return all of them, by name."""
    return [_shipped(name) for name in recipe_names()]


def recipe_text(name: str) -> str:
    """Return the file of a recipe as it is."""
    return find_recipe(name).read_text(encoding="utf-8")


def _shipped(name: str) -> Shipped:
    lines = recipe_text(name).splitlines()
    first = next(line for line in lines if not line.startswith("# yaml-language-server:"))
    match = _FIRST.fullmatch(first)
    assert match is not None, f"{name}: its first line is not `# PURPOSE [N x DEVICE]`"
    return Shipped(name=name, purpose=match["purpose"], devices=int(match["devices"]), device=match["device"])
