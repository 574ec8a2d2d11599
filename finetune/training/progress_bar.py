"""What a person sees of a run: a bar on a terminal, one plain line a step everywhere else."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from finetune.ranks.log import print_line

SMOOTHED = 10
"""Time left goes by the mean of about so many steps."""


def step_line(found: Mapping[str, Any]) -> str:
    """Return one step for people."""
    balance = f", balance {found['loss_balance']:.4f}" if found.get("loss_balance") else ""
    mfu = f", MFU {found['mfu']:.1%}" if found.get("mfu") else ""
    return (
        f"step {found['step']}: loss {found['loss']:.4f}{balance}, norm {found['grad_norm']:.3g}, "
        f"lr {found['lr']:.2e}, {found['tokens_nonpad']:,} tokens in {found['seconds']:.2f} s, "
        f"{found['tokens_per_second']:,.0f} useful tokens/s{mfu}, {found['left']} left"
    )


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class Follower:
    """Shows each step as it ends; `say` prints a line, and must not be given others' output while a bar is drawn."""

    def __init__(self, say: Callable[[str], None], *, done: int, steps: int, console: Console | None = None) -> None:
        self._say, self._done, self._steps = say, done, steps
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
        """Whether steps are drawn rather than said."""
        return self._bar is not None

    def step(self, found: Mapping[str, Any]) -> str:
        """Show one step, and return its line."""
        seconds = float(found["seconds"])
        # the first step of a start is slower than any other: it is forgotten when there is a second
        fresh = self._mean is None or found["step"] == self._done + 1
        self._mean = seconds if fresh or self._mean is None else self._mean + (seconds - self._mean) / SMOOTHED
        left = duration(self._mean * (self._steps - found["step"] - 1))
        line = step_line({**found, "left": left})
        if self._bar is None:
            self._say(line)
        else:
            mfu = f"  MFU {found['mfu']:.1%}" if found.get("mfu") else ""
            text = f"loss {found['loss']:.4f}  {found['tokens_per_second']:,.0f} tokens/s{mfu}  {left} left"
            self._bar.update(self._task, completed=found["step"] + 1, text=text)
        return line

    def print(self, text: str) -> None:
        """Print a line of somebody else's; above the bar where there is one."""
        if self._bar is None:
            print_line(text)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
