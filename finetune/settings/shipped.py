"""Lists the shipped recipes, with purpose and hardware from the second line of each file. Loads no torch."""

import re
from dataclasses import dataclass

from finetune.settings.recipes import find_recipe, recipe_names
from finetune.settings.schema import editor_line, schema_file

_SECOND = re.compile(r"# (?P<purpose>.+) \[(?P<devices>\d+) x (?P<device>\S+)\]")


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """A recipe that comes with the package."""

    name: str
    purpose: str
    devices: int
    device: str
    """A name for `moetune plan --gpu`, or cpu."""

    @property
    def hardware(self) -> str:
        """Return the number and kind of devices as text."""
        return f"{self.devices} x {self.device}"


def shipped_recipes() -> list[Shipped]:
    """Return all shipped recipes, sorted by name."""
    return [_shipped(name) for name in recipe_names()]


def recipe_text(name: str) -> str:
    """Return the text of a recipe, with a first line with which editors find the schema from any folder."""
    lines = find_recipe(name).read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join([f"{editor_line(str(schema_file()))}\n", *lines[1:]])


def _shipped(name: str) -> Shipped:
    match = _SECOND.fullmatch(recipe_text(name).splitlines()[1])
    assert match is not None, f"{name}: its second line is not `# PURPOSE [N x DEVICE]`"
    return Shipped(name=name, purpose=match["purpose"], devices=int(match["devices"]), device=match["device"])
