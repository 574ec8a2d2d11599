"""Evaluation on held-out samples while a run trains: loss, hits, and the distance from the base that it came from.

Every sample of every source is read exactly once, packed as in training, whatever the number of ranks: all take equally
many rows, some of them blank. Nothing of the training run is touched: no gradient, no statistic of the router, no
random state. What trains in full has no copy of its base, so KL covers the low-rank parts, and the router.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from data.config import DataConfig, SourceConfig
from data.open import open_corpus, open_stream
from data.render.sample import Renderer
from data.stream.batch import BadSample, Batch
from data.stream.stream import DataStream
from finetune.config import RunConfig
from finetune.model.divergence import Compared, compare_row
from finetune.model.lora import FamilyRow
from finetune.model.sequence import SequenceGroup
from finetune.ranks.collectives import Preempted, barrier, gather_lists, rank_and_world, require_no_wish, sum_over_ranks
from finetune.ranks.engine import engine_device
from finetune.ranks.hooks import forget_order
from finetune.settings.stages import longest_pack, run_stages
from finetune.training.predictions import Answers
from finetune.training.track import Tracker
from finetune.training.verdict import Judge, Measured, Verdict

FULL_SHARE = 0.05
"""Of the parameters, so much may train in full, and so be partitioned, where questions are answered."""

SUMS = ("samples", "tokens", "weight", "loss", "hits", "loss_base", "kl")


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """All sources at one step; step 0 is before the first update."""

    step: int
    seconds: float
    sources: Mapping[str, Measured]

    def flat(self) -> dict[str, float]:
        """Everything as numbers by name, `<source>/<quantity>`; what was not measured is absent."""
        found: dict[str, float] = {"step": self.step, "seconds": self.seconds}
        for name, measured in self.sources.items():
            found |= {f"{name}/{key}": value for key, value in vars(measured).items() if value is not None}
        return found

    def lines(self) -> list[str]:
        """A line a source, for people."""
        return [
            f"evaluation at step {self.step}, {name}: loss {m.loss:.4f}"
            + (f" (base {m.loss_base:.4f})" if m.loss_base is not None else "")
            + f", accuracy {m.accuracy:.4f}"
            + (f", KL {m.kl:.4g}" if m.kl is not None else "")
            + f", {m.samples:,} samples, {m.tokens:,} tokens"
            for name, m in self.sources.items()
        ]


class Evaluation:
    """The held-out sources of one run. Every rank must make one and call it at the same steps."""

    def __init__(
        self, config: RunConfig, renderer: Renderer, *, families: Iterable[FamilyRow],
        stops: Callable[[], frozenset[int]], resident: bool, say: Callable[[str], None], asked: Callable[[], int],
    ) -> None:  # fmt: skip
        """`asked` says which signal asks this rank for an end; 0 for none."""
        self._asked = asked
        self.config, self.judge, self._renderer, self._say = config.eval, Judge(config.eval), renderer, say
        self._steps = config.schedule.steps
        if not config.eval.sources:
            return
        rank, world = rank_and_world()
        data_size = world // config.parallel.sp
        self._data, self._seed, rows = held_out(config, packs_per_step=data_size), config.run.seed, list(families)
        self.with_base = any(row.mode == "lora" for row in rows)
        if rank == 0:
            open_corpus(self._data, renderer, section="eval")
        barrier()
        self._corpus = open_corpus(self._data, renderer, section="eval")
        count = sum(len(units) for units in self._corpus.sources)
        self._answers: Answers | None = None
        if config.eval.answers:
            full = sum(row.trained for row in rows if row.mode == "full") / sum(row.total for row in rows)
            if not resident or full > FULL_SHARE:
                why = f"{full:.0%} of them train in full" if resident else "they do not fit a rank"
                raise ValueError(
                    f"eval.answers: {config.eval.answers}, but the weights are partitioned over the ranks, as {why}: "
                    f"they would be gathered for each token. Set eval.answers=0, and ask a checkpoint's adapter"
                )
            self._answers = Answers(config.eval, self._data, renderer, stops=stops(), say=say, wish=asked)
        say(f"evaluation: {count:,} samples of {', '.join(config.eval.sources)}; {_scope(rows)}")

    def start(self, engine: Any, done: int, *, tracker: Tracker, owed: bool = False) -> bool:
        """Evaluate before the first step of a run, and say whether the run is over: one that resumes may be.

        `owed`: the start before was stopped by a signal after `done` steps, and did not evaluate then.
        """
        told = bool(done) and not owed
        last = owed and done == self._steps
        stop = self.judge.stop() if told else self.after(engine, done, tracker=tracker, last=last).stop
        if told and stop:
            self._say(f"stopped: {stop}")
        return stop is not None

    def after(self, engine: Any, step: int, *, tracker: Tracker, last: bool = False) -> Verdict:
        """Evaluate if so many steps ask for it, tell of it, and return what follows; every rank must call this.

        A signal breaks it off, and nothing is told of it then.
        """
        every = self.config.every_steps
        due = last or step == 0 or bool(every and step % every == 0)
        if not (due and self.config.sources):
            return Verdict()
        try:
            result = self.run(engine, step)
            rows = list[Mapping[str, Any]]()
            if self._answers is not None:
                with untouched(engine):
                    rows = self._answers.rows(engine, engine_device())
        except Preempted as wish:
            self._say(f"the evaluation at step {step} is left for the next start")
            return Verdict(preempted=wish.number)
        tracker.evaluation(result.flat())
        tracker.predictions(step, rows)
        verdict = self.judge.judge(step, result.sources)
        for line in (*result.lines(), *verdict.said, *([f"stopped: {verdict.stop}"] if verdict.stop else [])):
            self._say(line)
        return verdict

    def run(self, engine: Any, step: int) -> EvaluationResult:
        """Measure the model as it is; every rank must call this, between steps, and gets the same result."""
        began, device = time.perf_counter(), engine_device()
        names = list(self.config.sources)
        sums = torch.zeros(len(names), len(SUMS), dtype=torch.float64)
        measure = partial(compare_row, with_base=self.with_base)
        group = engine.module.sequence  # of the present stage: its ranks read the same rows
        stream, counts, bad = self._stream(group), group is None or group.rank == 0, list[BadSample]()
        with untouched(engine):
            for taken in stream:
                for batch in taken.batches:
                    require_no_wish(self._asked(), device)
                    _add(sums, names, batch, engine(batch=batch, measure=measure), count_samples=counts)
                bad += taken.bad if counts else ()
        everyone = torch.tensor(sum_over_ranks(sums.flatten().tolist(), device)).view_as(sums).tolist()
        left_out = gather_lists(bad)
        stream.quarantine(left_out)  # raises above data.max_bad_samples
        for item in left_out:
            self._say(f"left out of the evaluation: {item}")
        sources = {name: measured(name, row, self.with_base) for name, row in zip(names, everyone, strict=True)}
        return EvaluationResult(step=step, seconds=time.perf_counter() - began, sources=sources)

    def _stream(self, group: SequenceGroup | None) -> DataStream:
        rank, world = rank_and_world()
        together = group.size if group is not None else 1
        rank, size = rank // together, world // together
        return open_stream(self._data, self._corpus, self._renderer, seed=self._seed, rank=rank, size=size)


def held_out(config: RunConfig, *, packs_per_step: int) -> DataConfig:
    """The `data:` section by which held-out samples are read: each once, all of them."""
    sources = {name: SourceConfig(path=source.path) for name, source in config.eval.sources.items()}
    longest = longest_pack(run_stages(config))
    return replace(
        config.data,
        tokens_per_pack=longest,
        sources=sources,
        mixture="natural",
        remainder="keep",
        balance_steps=0,
        packs_per_step=packs_per_step,
    )


def _scope(rows: list[FamilyRow]) -> str:
    """What KL(base || tuned) covers."""
    lora = [row.family for row in rows if row.mode == "lora"]
    full = [row.family for row in rows if row.mode == "full" and row.family != "router"]
    if not lora:
        return "no KL: nothing trains as lora, and what trains in full has no copy of its base"
    covered = lora + [row.family for row in rows if row.mode == "full" and row.family == "router"]
    text = f"KL(base || tuned) is that of {', '.join(covered)}"
    return f"{text}; not of {', '.join(full)}, whose base values are not kept" if full else text


@contextmanager
def untouched(engine: Any) -> Any:
    """Evaluate without dropout or gradient, and leave random states as they were: readers draw from them."""
    device = engine_device()
    engine.eval()
    forget_order(engine)
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        engine.train()
        forget_order(engine)


def _add(sums: torch.Tensor, names: list[str], batch: Batch, found: Compared, *, count_samples: bool) -> None:
    """Add a row's tokens up by the source of their samples, in float64 on the host; a shared row's samples once."""
    source_S = torch.tensor([names.index(key.partition("/")[0]) for key in batch.keys], dtype=torch.long)
    if not len(source_S):
        return
    sums[:, 0] += torch.bincount(source_S, minlength=len(names)) * count_samples
    source_N = source_S[found.owners_N.cpu()]
    weights_N = found.weights_N.double()
    columns = (
        torch.ones_like(weights_N), weights_N, weights_N * found.ce_N, found.hits_N, weights_N * found.base_ce_N,
        found.kl_N,
    )  # fmt: skip
    sums[:, 1:].index_add_(0, source_N, torch.stack([column.double() for column in columns], 1).cpu())


def measured(name: str, row: list[float], with_base: bool) -> Measured:
    """Return a source's means from its sums over all ranks."""
    found = dict(zip(SUMS, row, strict=True))
    if not found["tokens"]:
        raise ValueError(
            f"eval.sources.{name}: not one token of its samples is supervised, so there is nothing to measure. Look at "
            f"it with `moetune shards show`"
        )
    return Measured(
        samples=int(found["samples"]),
        tokens=int(found["tokens"]),
        loss=found["loss"] / found["weight"],
        accuracy=found["hits"] / found["tokens"],
        loss_base=found["loss_base"] / found["weight"] if with_base else None,
        kl=found["kl"] / found["tokens"] if with_base else None,
    )
