"""What is wrong with the `data:` section by itself: numbers out of range, settings without effect. No torch."""

from dataclasses import dataclass
from math import isfinite

from data.config import DataConfig


@dataclass(frozen=True, kw_only=True)
class DataProblem:
    """A key below `data.`, what it holds, what is allowed, and what to do."""

    key: str
    value: object
    allowed: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.key}={self.value!r}: {self.allowed}. {self.remedy}"


def data_problems(config: DataConfig) -> list[DataProblem]:
    """Every problem at once."""
    least = {
        "packs_per_step": 1,
        "tokens_per_pack": 1,
        "vision_tokens_per_pack": 1,
        "balance_steps": 0,
        "pad_multiple": 1,
        "workers": 0,
        "prefetch": 1,
        "max_bad_samples": 0,
        "stall_seconds": 0,
    }
    problems = [
        DataProblem(
            key=f"data.{name}", value=value, allowed=f"at least {bound} is wanted", remedy=f"Set it to {bound} or more"
        )
        for name, bound in least.items()
        if (value := getattr(config, name)) is not None and not value >= bound
    ]
    if not config.sources:
        remedy = "Add data.sources.<name>.path=... (shards or a JSONL file)"
        problems.append(
            DataProblem(key="data.sources", value={}, allowed="there is nothing to train on", remedy=remedy)
        )
    for name, source in config.sources.items():
        key, weight = f"data.sources.{name}.weight", source.weight
        if not (isfinite(weight) and weight > 0):
            problems.append(
                DataProblem(key=key, value=weight, allowed="a finite number above 0 is wanted", remedy="Set it to one")
            )
        elif config.mixture == "natural" and weight != 1:
            remedy = "Set data.mixture to tokens or samples, or drop the weight"
            allowed = "it has no effect with data.mixture=natural, which reads every sample once an epoch"
            problems.append(DataProblem(key=key, value=weight, allowed=allowed, remedy=remedy))
    return problems
