"""Evaluation on held-out samples while a run trains: loss, hits, and the distance from its base.

Every sample of every source is read exactly once, packed as in training, on any number of ranks: all take the same
number of rows, and some rows are blank. The training run is not touched: no gradient, no statistic of the router, no
random state. Parts that train in full have no copy of their base, so KL covers the low-rank parts and the router.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.config import DataConfig
from data.format.printable import count_of
from data.open import open_stream
from data.render.sample import Renderer
from data.stream.batch import BadSample, Batch
from data.stream.corpus import Corpus
from data.stream.plan import Units
from finetune.config import RunConfig
from finetune.files.hubfiles import stop_tokens
from finetune.model.divergence import Compared, compare_row
from finetune.model.lora import PartRow
from finetune.ranks.collectives import Preempted, gather_lists, rank_and_world, require_no_wish, sum_over_ranks
from finetune.ranks.engine import engine_device
from finetune.ranks.hooks import forget_order
from finetune.ranks.watch import Watch
from finetune.settings.stages import longest_pack, run_stages
from finetune.tracking.track import Tracker
from finetune.training.predictions import Predictions
from finetune.training.steps import data_share, open_together
from finetune.training.verdict import Judge, Measured, Verdict

FULL_SHARE = 0.05
"""The largest share of parameters that may train in full, and so be partitioned, if questions are answered."""

SUMS = ("samples", "tokens", "weight", "loss", "hits", "loss_base", "kl")


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The results of all sources at one step; step 0 is before the first update."""

    step: int
    seconds: float
    sources: Mapping[str, Measured]

    def flat(self) -> dict[str, float]:
        """Return every number by name, `<source>/<quantity>`; quantities that were not measured are absent."""
        numbers: dict[str, float] = {"step": self.step, "seconds": self.seconds}
        for name, measured in self.sources.items():
            numbers |= {f"{name}/{key}": value for key, value in vars(measured).items() if value is not None}
        return numbers

    def lines(self) -> list[str]:
        """Return a line for each source, to be printed."""
        return [
            f"evaluation at step {self.step}, {name}: loss {m.loss:.4f}"
            + (f" ({m.loss_base:.4f} with adapters off)" if m.loss_base is not None else "")
            + f", accuracy {m.accuracy:.4f}"
            + (f", KL {m.kl:.4g}" if m.kl is not None else "")
            + f", {count_of(m.samples, 'sample')}, {count_of(m.tokens, 'token')}"
            for name, m in self.sources.items()
        ]


class Evaluation:
    """The evaluations of one run, and their consequences. Every rank must make one and call it at the same steps."""

    def __init__(
        self,
        config: RunConfig,
        renderer: Renderer,
        rows: Sequence[PartRow],
        *,
        base_folder: Path,
        resident: bool,
        say: Callable[[str], None],
        watch: Watch,
        rehearses: bool = False,
    ) -> None:
        """Open the sources. `rows` say what trains, `resident` whether frozen weights are complete on each rank.

        A run that `rehearses` reads one row of each source.
        """
        self.judge = Judge(config.eval)
        self._every_steps, self._last_step = config.eval.every_steps, config.schedule.steps
        self._say, self._watch = say, watch
        self._held_out: HeldOut | None = None
        if config.eval.sources:
            self._held_out = HeldOut(
                config,
                renderer,
                rows,
                base_folder=base_folder,
                resident=resident,
                say=say,
                watch=watch,
                rehearses=rehearses,
            )

    def start(self, engine: Any, done: int, *, tracker: Tracker, owed: bool = False) -> bool:
        """Evaluate before the first step of a run, and return whether the run is over, as a resumed one may be.

        `owed`: the start before was stopped by a signal after `done` steps, and did not evaluate then.
        """
        self._watch.stage("evaluation")
        if not done or owed:
            is_last = owed and done == self._last_step
            return self.after(engine, done, tracker=tracker, last=is_last).stop is not None
        reason = self.judge.stop()
        if reason:
            self._say(f"stopped: {reason}")
        return reason is not None

    def after(self, engine: Any, step: int, *, tracker: Tracker, last: bool = False) -> Verdict:
        """Evaluate if it is due after `step` steps, report it, and return the verdict; every rank must call this.

        If a signal interrupts the evaluation, nothing is reported.
        """
        self._watch.stage("evaluation", quiet=True)
        is_due = last or step == 0 or bool(self._every_steps and step % self._every_steps == 0)
        if self._held_out is None or not is_due:
            return Verdict()
        try:
            result = self._held_out.measure(engine, step)
            answers = self._held_out.answers(engine)
        except Preempted as wish:
            self._say(f"the evaluation at step {step} was interrupted; the next start repeats it")
            return Verdict(preempted=wish.number)
        tracker.evaluation(result.flat())
        tracker.predictions(step, answers)
        verdict = self.judge.judge(step, result.sources)
        for line in (*result.lines(), *verdict.sentences, *([f"stopped: {verdict.stop}"] if verdict.stop else [])):
            self._say(line)
        return verdict


class HeldOut:
    """The open held-out sources of one run. Every rank must make one and call it at the same steps."""

    def __init__(
        self,
        config: RunConfig,
        renderer: Renderer,
        rows: Sequence[PartRow],
        *,
        base_folder: Path,
        resident: bool,
        say: Callable[[str], None],
        watch: Watch,
        rehearses: bool = False,
    ) -> None:
        self._names, self._seed = list(config.eval.sources), config.run.seed
        self._renderer, self._say = renderer, say
        self._watch = watch
        self._data = held_out(config, packs_per_step=rank_and_world()[1] // config.parallel.sp)
        self._with_base = any(row.mode == "lora" for row in rows)
        corpus = open_together(self._data, renderer, section="eval")
        self._corpus = one_row_each(corpus, tokens=self._data.tokens_per_pack) if rehearses else corpus
        self._predictions: Predictions | None = None
        if config.eval.answers:
            _require_resident(config.eval.answers, rows, resident)
            stops = stop_tokens(base_folder)
            self._predictions = Predictions(config.eval, self._data, renderer, stops=stops, say=say, watch=watch)
        count = sum(len(units) for units in self._corpus.sources)
        say(f"evaluation: {count_of(count, 'sample')} of {', '.join(self._names)}; {_scope(rows)}")

    def measure(self, engine: Any, step: int) -> EvaluationResult:
        """Measure the present model. Every rank must call this between steps, and all get the same result."""
        began, device = time.perf_counter(), engine_device()
        sums = torch.zeros(len(self._names), len(SUMS), dtype=torch.float64)
        measure = partial(compare_row, with_base=self._with_base)
        group = engine.module.sequence  # of the present stage: its ranks read the same rows
        share, shares = data_share(group)
        stream = open_stream(self._data, self._corpus, self._renderer, seed=self._seed, rank=share, size=shares)
        counts_samples = group is None or group.rank == 0
        bad_samples = list[BadSample]()
        with untouched(engine):
            for taken in stream:
                for batch in taken.batches:
                    require_no_wish(self._watch.stop, device)
                    compared = engine(batch=batch, measure=measure)
                    _add(sums, self._names, batch, compared, count_samples=counts_samples)
                bad_samples += taken.bad if counts_samples else ()
        total_sums = torch.tensor(sum_over_ranks(sums.flatten().tolist(), device)).view_as(sums).tolist()
        left_out = gather_lists(bad_samples)
        stream.quarantine(left_out)  # raises above data.max_bad_samples
        for sample in left_out:
            self._say(f"left out of the evaluation: {sample}")
        sources = {
            name: measured(name, row, self._with_base) for name, row in zip(self._names, total_sums, strict=True)
        }
        return EvaluationResult(step=step, seconds=time.perf_counter() - began, sources=sources)

    def answers(self, engine: Any) -> list[Mapping[str, Any]]:
        """Answer the questions that eval.answers asks for; every rank must call this."""
        if self._predictions is None:
            return []
        with untouched(engine):
            return self._predictions.rows(engine, engine_device())


def held_out(config: RunConfig, *, packs_per_step: int) -> DataConfig:
    """Return the `data:` section for the held-out samples: all of them are read, each once."""
    sources = {name: source.as_data for name, source in config.eval.sources.items()}
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


def one_row_each(corpus: Corpus, *, tokens: int) -> Corpus:
    """Return the corpus with as many samples of each source as fit into a row of `tokens`, and at least one."""
    return replace(corpus, sources=tuple(_first_row(units, tokens) for units in corpus.sources))


def _first_row(units: Units, tokens: int) -> Units:
    count = max(1, int((units.tokens.cumsum() <= tokens).sum()))
    return replace(units, **{name: column[:count] for name, column in vars(units).items() if name != "name"})


def _require_resident(answers: int, rows: Sequence[PartRow], resident: bool) -> None:
    """Raise unless nearly all weights are complete on every rank: an answer takes a forward per token."""
    full = sum(row.trained for row in rows if row.mode == "full") / sum(row.total for row in rows)
    if resident and full <= FULL_SHARE:
        return
    why = f"{full:.0%} of them train in full" if resident else "they do not fit on one rank"
    raise ValueError(
        f"eval.answers is {answers}, but the weights are partitioned over the ranks because {why}: "
        f"they would be gathered for each token. Set eval.answers=0, and ask a checkpoint's adapter instead"
    )


def _scope(rows: Sequence[PartRow]) -> str:
    """Describe which parts KL(base || tuned) covers."""
    lora = [row.part for row in rows if row.mode == "lora"]
    full = [row.part for row in rows if row.mode == "full" and row.part != "router"]
    if not lora:
        return "no KL: no part trains as LoRA, and parts that train in full keep no copy of their base"
    covered = lora + [row.part for row in rows if row.mode == "full" and row.part == "router"]
    text = f"KL(base || tuned) covers {', '.join(covered)}"
    if not full:
        return text
    keeps = "keeps no base values and also changes" if len(full) == 1 else "keep no base values and also change"
    return f"{text}, but not {', '.join(full)}: {'it' if len(full) == 1 else 'they'} {keeps} the loss with adapters off"


@contextmanager
def untouched(engine: Any) -> Any:
    """Evaluate without dropout or gradients, and restore the random states, because readers draw from them."""
    device = engine_device()
    engine.eval()
    forget_order(engine)
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        engine.train()
        forget_order(engine)


def _add(sums: torch.Tensor, names: list[str], batch: Batch, compared: Compared, *, count_samples: bool) -> None:
    """Add up a row's tokens by source, in float64 on the host; samples of a shared row count once."""
    source_S = torch.tensor([names.index(key.partition("/")[0]) for key in batch.keys], dtype=torch.long)
    if not len(source_S):
        return
    sums[:, 0] += torch.bincount(source_S, minlength=len(names)) * count_samples
    source_N = source_S[compared.owners_N.cpu()]
    weights_N = compared.weights_N.double()
    columns = {
        "tokens": torch.ones_like(weights_N),
        "weight": weights_N,
        "loss": weights_N * compared.ce_N,
        "hits": compared.hits_N,
        "loss_base": weights_N * compared.base_ce_N,
        "kl": compared.kl_N,
    }
    values_NQ = torch.stack([columns[name].double() for name in SUMS[1:]], 1)
    sums[:, 1:].index_add_(0, source_N, values_NQ.cpu())


def measured(name: str, row: list[float], with_base: bool) -> Measured:
    """Return a source's means from its sums over all ranks."""
    sums = dict(zip(SUMS, row, strict=True))
    if not sums["tokens"]:
        raise ValueError(
            f"eval.sources.{name}: no token of its samples is supervised, so there is nothing to measure. Look at the "
            f"samples with `moetune shards show`"
        )
    return Measured(
        samples=int(sums["samples"]),
        tokens=int(sums["tokens"]),
        loss=sums["loss"] / sums["weight"],
        accuracy=sums["hits"] / sums["tokens"],
        loss_base=sums["loss_base"] / sums["weight"] if with_base else None,
        kl=sums["kl"] / sums["tokens"] if with_base else None,
    )
