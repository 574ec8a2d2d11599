"""Shows the progress of a run: a bar on a terminal, one plain line per step everywhere else."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from finetune.ranks.log import print_line

SMOOTHED = 10
"""The time left is estimated from the mean of about this many steps."""


def step_line(figures: Mapping[str, Any]) -> str:
    """Describe one step in a line."""
    balance = f", balance {figures['loss_balance']:.4f}" if figures.get("loss_balance") else ""
    mfu = f", MFU {figures['mfu']:.1%}" if figures.get("mfu") else ""
    return (
        f"step {figures['step']}: loss {figures['loss']:.4f}{balance}, norm {figures['grad_norm']:.3g}, "
        f"lr {figures['lr']:.2e}, {figures['tokens_nonpad']:,} tokens in {figures['seconds']:.2f} s, "
        f"{figures['tokens_per_second']:,.0f} useful tokens/s{mfu}, {figures['left']} left"
    )


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class Follower:
    """Shows each step when it ends. While a bar is drawn, all other output must go through `print`."""

    def __init__(
        self,
        say: Callable[[str], None],
        *,
        done: int,
        steps: int,
        evaluates_every: int | None = None,
        evaluation_seconds: float = 0.0,
        console: Console | None = None,
    ) -> None:
        """`evaluates_every` is None for a run without evaluations; `evaluation_seconds` is what the last one took."""
        self._say = say
        self._evaluates_every, self._evaluation_seconds = evaluates_every, evaluation_seconds
        self._done, self._steps = done, steps
        self._mean: float | None = None
        self._console = console or Console(file=sys.stdout)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (
                TextColumn("step"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("train", total=steps, completed=done, text="")
            self._bar.start()

    @property
    def is_bar(self) -> bool:
        """True if steps are drawn as a bar, not printed line by line."""
        return self._bar is not None

    def step(self, figures: Mapping[str, Any]) -> str:
        """Show one step, and return its line."""
        seconds = float(figures["seconds"])
        # the first step of a start is slower than all others: the second one replaces its time
        if self._mean is None or figures["step"] == self._done + 1:
            self._mean = seconds
        else:
            self._mean += (seconds - self._mean) / SMOOTHED
        evaluations = self._evaluation_seconds * self._evaluations_left(figures["step"])
        left = duration(self._mean * (self._steps - figures["step"] - 1) + evaluations)
        line = step_line({**figures, "left": left})
        if self._bar is None:
            self._say(line)
        else:
            mfu = f"  MFU {figures['mfu']:.1%}" if figures.get("mfu") else ""
            text = f"loss {figures['loss']:.4f}  {figures['tokens_per_second']:,.0f} tokens/s{mfu}  {left} left"
            self._bar.update(self._task, completed=figures["step"] + 1, text=text)
        return line

    def evaluation(self, seconds: float) -> None:
        """Note how long an evaluation took, to count those to come in the time left."""
        self._evaluation_seconds = seconds

    def _evaluations_left(self, step: int) -> int:
        """Count the evaluations after a step: the regular ones, and that after the last step."""
        every, last = self._evaluates_every, self._steps - 1
        if every is None:
            return 0
        return 1 + (last // every - step // every if every else 0)

    def print(self, text: str) -> None:
        """Print a line that is not about a step, above the bar if there is one."""
        if self._bar is None:
            print_line(text)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
