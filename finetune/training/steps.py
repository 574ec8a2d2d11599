"""The data of a run, step by step: over the epochs of a stage, and from one stage's data to the next one's.

A stage that reads otherwise than the one before has a plan of its own. It starts with the epoch after the one that the
other broke off, so that no source begins at its first sample again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from data.config import DataConfig
from data.open import PATCHES_PER_TOKEN, open_corpus, open_stream
from data.render.sample import Renderer
from data.stream.batch import Step, keys_of
from data.stream.corpus import Corpus
from data.stream.stats import corpus_lines
from data.stream.stream import DataStream, WaitIsOver
from finetune.model.sequence import SequenceGroup, counted_once
from finetune.ranks.collectives import barrier, gather_lists, rank_and_world, require_no_wish
from finetune.ranks.watch import Watch
from finetune.settings.stages import Stage, stage_of


class RunData:
    """The steps of one run for this rank. Every rank must make one and call its methods, at the same points."""

    def __init__(
        self, stages: Sequence[Stage], renderer: Renderer, *, seed: int, groups: Mapping[int, SequenceGroup | None]
    ) -> None:
        self.stages, self.renderer, self.seed, self.groups = stages, renderer, seed, groups
        self._streams: dict[int, DataStream] = {}
        self._corpora: dict[int, Corpus] = {}
        self._steps: Iterator[Step] = iter(())
        for stage in stages:
            self._open(stage)  # all of them before the first step: what is wrong with the last one's data is known then
        self._stage = stages[0]

    @property
    def stream(self) -> DataStream:
        """What the present stage reads."""
        return self._streams[self._stage.number]

    @property
    def corpora(self) -> list[Corpus]:
        """What the stages read, each once."""
        return list(self._corpora.values())

    def lines(self) -> Iterator[str]:
        """What there is to read, for people: where its tokens lie, and how long an epoch of each stage is."""
        told: set[int] = set()
        for stage in self.stages:
            stream = self._streams[stage.number]
            if id(stream) not in told:
                yield from corpus_lines(self._corpora[stage.number], patches_per_token=PATCHES_PER_TOKEN)
            told.add(id(stream))
            where = f", stage {stage.name}" if stage.name else ""
            each = stream.plan.steps
            epochs = f"; {stage.steps} steps are {stage.steps / each:.3g} epochs" if each else ""
            yield f"data{where}: {each} steps an epoch of {stage.data.packs_per_step} packs{epochs}"

    def take(self, number: int, *, is_over: Callable[[], bool] = lambda: False) -> Step:
        """Return this rank's share of step `number` of the run; they must be taken in their order.

        Raises WaitIsOver while it waits for readers when `is_over` says so.
        """
        stage = stage_of(self.stages, number)
        if stage is not self._stage:
            self._move(stage)
        self.stream.is_over = is_over
        for _ in range(2):
            step = next(self._steps, None)
            if step is not None:
                return counted_once(step, self.groups[stage.sp])
            if 0 < self.stream.plan.steps <= self.stream.step:
                self.stream.next_epoch()
            self._steps = iter(self.stream)
        raise ValueError(
            "data: an epoch has not one step: fewer packs than data.packs_per_step. Give more data, set "
            "data.packs_per_step lower, or data.remainder=keep"
        )

    def settle_bad_samples(self, step: Step, say: Callable[[str], None]) -> None:
        """Tell every rank what any rank could not read; it is left out from the next epoch on."""
        bad = gather_lists(list(step.bad))
        for item in bad:
            say(f"left out: {item}")
        self.stream.quarantine(bad)

    def state_dict(self) -> dict[str, Any]:
        """Where the data is, equal on every rank."""
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any], *, done: int) -> None:
        """Continue where it was after `done` steps of the run."""
        self._stage = stage_of(self.stages, max(0, done - 1))
        self.stream.load_state_dict(state)
        self._steps = iter(())

    def _open(self, stage: Stage) -> None:
        """Open a stage's stream; it is the one of the stage before where both read the same."""
        before = self.stages[stage.number - 1] if stage.number else None
        if before is not None and before.data == stage.data and before.sp == stage.sp:
            self._streams[stage.number] = self._streams[before.number]
        else:
            self._corpora[stage.number], self._streams[stage.number] = open_data(
                stage.data, self.renderer, seed=self.seed, sequence=self.groups[stage.sp]
            )

    def _move(self, stage: Stage) -> None:
        before, read = self.stream, self._stage.data
        self._stage = stage
        if self.stream is not before:
            position = before.state_dict()
            if stage.data != read:  # else only the ranks share its rows otherwise
                position |= {"epoch": before.epoch + 1, "step": 0}
            self.stream.load_state_dict(position, changed=True)
            self._steps = iter(())


def take_together(data: RunData, number: int, watch: Watch, device: torch.device) -> Step:
    """Return this rank's share of a step that all ranks begin; every rank must call this.

    When a signal asks any rank for an end, Preempted is raised on all, and none waits for its data any longer.
    """
    step = None
    watch.data(number)
    try:
        step = data.take(number, is_over=lambda: bool(watch.stop))
    except WaitIsOver as over:
        watch.broken_off = over
    watch.work(number, "the question whether to begin it", keys_of(step.batches) if step is not None else ())
    require_no_wish(watch.stop, device)
    assert step is not None, "no data without a wish"
    return step


def open_data(
    config: DataConfig, renderer: Renderer, *, seed: int, sequence: SequenceGroup | None = None
) -> tuple[Corpus, DataStream]:
    """Open what this rank reads; rank 0 indexes and converts what is new, the others then find it done.

    Ranks of a sequence group read the same.
    """
    rank, world = rank_and_world()
    if rank == 0:
        open_corpus(config, renderer)
    barrier()
    corpus = open_corpus(config, renderer)
    together = sequence.size if sequence is not None else 1
    stream = open_stream(config, corpus, renderer, seed=seed, rank=rank // together, size=world // together)
    return corpus, stream
