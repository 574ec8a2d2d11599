"""Problems of a configuration as data, which are collected, shown together and raised once. Loads no torch."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from data.checks import Problem as Problem  # one class for the data section and for all others


def problem(key: str, found: object, allowed: str, remedy: str, *, warning: bool = False) -> Problem:
    """Return one problem; `allowed` and `remedy` end without a full stop."""
    return Problem(key=key, found=found, allowed=allowed, remedy=remedy, level="warning" if warning else "error")


class ConfigError(ValueError):
    """Raised when a configuration cannot be used; carries every problem found."""

    def __init__(self, problems: Iterable[Problem], what: str = "in the configuration") -> None:
        self.problems = list(problems)
        errors = [problem for problem in self.problems if problem.level == "error"]
        lines = "\n".join(f"  {error}" for error in errors)
        super().__init__(f"{len(errors)} problem{'s' if len(errors) != 1 else ''} {what}:\n{lines}")


def divisors(number: int) -> str:
    """Return the divisors of a number, from 1 on, separated by commas."""
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """Return a remedy: the nearest choice, else all choices; empty if there are none. It ends without a full stop."""
    begun = [choice for choice in choices if word and choice.startswith(word)]
    near = begun or get_close_matches(word, choices, n=1, cutoff=0.6)
    if near:
        return f"Did you mean `{near[0]}`"
    return f"Choose from {', '.join(choices)}" if choices else ""
