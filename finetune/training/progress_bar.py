"""Shows the progress of a run: a bar on a terminal, one plain line a step everywhere else."""

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
    """Shows each step as it ends. While a bar is drawn, all other output must go through `print`."""

    def __init__(self, say: Callable[[str], None], *, done: int, steps: int, console: Console | None = None) -> None:
        self._say = say
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
        """Whether steps are drawn, not printed line by line."""
        return self._bar is not None

    def step(self, figures: Mapping[str, Any]) -> str:
        """Show one step, and return its line."""
        seconds = float(figures["seconds"])
        # the first step of a start is slower than any other: it is forgotten when there is a second
        if self._mean is None or figures["step"] == self._done + 1:
            self._mean = seconds
        else:
            self._mean += (seconds - self._mean) / SMOOTHED
        left = duration(self._mean * (self._steps - figures["step"] - 1))
        line = step_line({**figures, "left": left})
        if self._bar is None:
            self._say(line)
        else:
            mfu = f"  MFU {figures['mfu']:.1%}" if figures.get("mfu") else ""
            text = f"loss {figures['loss']:.4f}  {figures['tokens_per_second']:,.0f} tokens/s{mfu}  {left} left"
            self._bar.update(self._task, completed=figures["step"] + 1, text=text)
        return line

    def print(self, text: str) -> None:
        """Print a line that is not a step's, above the bar if there is one."""
        if self._bar is None:
            print_line(text)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
