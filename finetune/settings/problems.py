"""What is wrong with a configuration, as data: collected, shown together, raised once. Loads no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One finding: the dotted key, what was found there, what is allowed, what to do."""

    key: str
    found: Any
    allowed: str
    remedy: str
    source: str = ""
    level: Literal["error", "warning"] = "error"

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def __str__(self) -> str:
        origin = f" ({self.source})" if self.source else ""
        return f"{self.key} = {self.found!r}{origin}: {self.allowed}. {self.remedy}."


class ConfigError(ValueError):
    """The user's configuration cannot be used; carries every problem found."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        errors = sum(problem.level == "error" for problem in self.problems)
        lines = "\n".join(f"  {problem}" for problem in self.problems if problem.level == "error")
        super().__init__(f"{errors} problem{'s' if errors != 1 else ''} in the configuration:\n{lines}")


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """A remedy: the nearest of the choices, else all of them; empty when there are none. No closing full stop."""
    begun = [choice for choice in choices if word and choice.startswith(word)]
    near = begun or get_close_matches(word, choices, n=1, cutoff=0.6)
    if near:
        return f"Did you mean `{near[0]}`"
    return f"Choose from {', '.join(choices)}" if choices else ""
