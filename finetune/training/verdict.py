"""Judges an evaluation: whether it is the best so far, whether it passes the bound of a guard, whether to stop.

Loads no torch. The state is JSON in the checkpoint, so that a resumed run judges like an uninterrupted one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.format.printable import count_of
from finetune.config import EvalConfig
from finetune.settings.check_evaluation import HIGHER_IS_BETTER


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The means of one source over its supervised tokens; the mean of the loss is weighted as in training."""

    samples: int
    tokens: int
    loss: float
    accuracy: float
    loss_base: float | None
    """The loss with the adapters switched off; like `kl`, it is None if there is no low-rank part to switch off."""
    kl: float | None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict on an evaluation: sentences to print, whether to keep this state, and why to end the run."""

    is_best: bool = False
    sentences: tuple[str, ...] = ()
    stop: str | None = None
    preempted: int = 0
    """The signal that interrupted the evaluation, which the next start repeats; 0 for none."""


class Judge:
    """Remembers the first losses, the best metric, and the number of evaluations since then."""

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self.first: dict[str, float] = {}
        self.best: dict[str, Any] = {}
        self.stale = 0
        self.last: dict[str, dict[str, float | None]] = {}  # everything measured, by source

    def judge(self, step: int, sources: Mapping[str, Measured]) -> Verdict:
        """Judge one evaluation; call this in the order of steps. The first evaluation is the reference."""
        for name, measured in sources.items():
            self.first.setdefault(name, measured.loss)
            self.last[name] = dict(vars(measured))
        sentences = [text for name in self.config.sources for text in self._passed_bounds(name)]
        is_best = step > 0 and bool(self.config.metric) and self._is_best(step, sources)
        if is_best:
            sentences.append(f"best {self.config.metric} so far: {self.best['value']:.4f}")
        return Verdict(is_best=is_best, sentences=tuple(sentences), stop=self.stop())

    def tripped(self) -> list[str]:
        """Return a sentence for each passed bound of a guard that ends the run, by the present configuration."""
        return [
            text
            for name, source in self.config.sources.items()
            if source.guard == "stop"
            for text in self._passed_bounds(name)
        ]

    def stop(self) -> str | None:
        """Return why the run ends, by the present configuration; None if it goes on."""
        if tripped := self.tripped():
            return "; ".join(tripped)
        if self.config.patience and self.stale >= self.config.patience:
            return (
                f"eval.patience={self.config.patience}: {self.config.metric} has not improved on "
                f"{self.best['value']:.4f} of step {self.best['step']} for {count_of(self.stale, 'evaluation')}"
            )
        return None

    def _is_best(self, step: int, sources: Mapping[str, Measured]) -> bool:
        """Return whether the metric is the best so far, and remember it."""
        source, _, quantity = self.config.metric.rpartition("/")
        value = getattr(sources[source], quantity)
        sign = 1 if HIGHER_IS_BETTER[quantity] else -1
        if self.best and sign * value <= sign * self.best["value"]:
            self.stale += 1
            return False
        self.best, self.stale = {"metric": self.config.metric, "step": step, "value": value}, 0
        return True

    def _passed_bounds(self, name: str) -> list[str]:
        """Return a sentence for each bound of a source's guard that the last evaluation passed."""
        source, last = self.config.sources[name], self.last.get(name)
        if source.guard == "none" or last is None:
            return []
        assert last["loss"] is not None
        rise = last["loss"] - self.first[name]
        bounds = (
            ("max_kl", "KL(base || tuned) is", last["kl"], source.max_kl),
            ("max_loss_rise", "the loss rose by", rise, source.max_loss_rise),
        )
        return [
            f"guard {name}: {words} {value:.4f}, above eval.sources.{name}.{key}={bound:g}"
            for key, words, value, bound in bounds
            if bound is not None and value is not None and not value <= bound
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"first": self.first, "last": self.last, "best": self.best, "stale": self.stale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint, with the present bounds and patience; a changed metric begins again."""
        if not state:
            return
        self.first, self.last = dict(state["first"]), dict(state["last"])
        is_same_metric = state["best"].get("metric") == self.config.metric
        self.best, self.stale = (dict(state["best"]), state["stale"]) if is_same_metric else ({}, 0)


def scores(state: Mapping[str, Any]) -> dict[str, float]:
    """Return the last numbers in a judge's state, by `<source>/<quantity>`."""
    return {
        f"{name}/{key}": value
        for name, measured in state.get("last", {}).items()
        for key, value in measured.items()
        if value is not None
    }
