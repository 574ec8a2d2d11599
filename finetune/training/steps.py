"""The data of a run, step by step: over the epochs of a stage, and from the data of one stage to the next.

A stage that reads other data than the stage before has its own plan. It starts with the epoch after the interrupted
one, so that no source begins again at its first sample.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from data.config import DataConfig
from data.format.printable import count_of
from data.open import open_corpus, open_stream
from data.render.sample import Renderer
from data.stream.batch import Step, keys_of
from data.stream.corpus import Corpus
from data.stream.plan import PATCHES_PER_TOKEN
from data.stream.stats import corpus_lines
from data.stream.stream import DataStream, WaitIsOver
from finetune.config import RunConfig
from finetune.model.sequence import SequenceGroup, counted_once
from finetune.ranks.collectives import barrier, gather_lists, rank_and_world, require_no_wish
from finetune.ranks.watch import Watch
from finetune.settings.check_schedule import with_steps
from finetune.settings.stages import Stage, run_stages, stage_of


class RunData:
    """The steps of one run for this rank. Every rank must make one and call its methods, at the same points."""

    def __init__(
        self, stages: Sequence[Stage], renderer: Renderer, *, seed: int, groups: Mapping[int, SequenceGroup | None]
    ) -> None:
        self.stages, self.groups = stages, groups
        self.renderer, self.seed = renderer, seed
        self._streams: dict[int, DataStream] = {}
        self._corpora: dict[int, Corpus] = {}
        self._steps: Iterator[Step] = iter(())
        for stage in stages:
            self._open(stage)  # all before the first step, so that problems in the data of the last stage show early
        self._stage = stages[0]

    @property
    def stream(self) -> DataStream:
        """The stream of the present stage."""
        return self._streams[self._stage.number]

    def reading(self) -> Sequence[str]:
        """Name the samples that are being read now."""
        return self.stream.reading()

    @property
    def corpora(self) -> list[Corpus]:
        """The corpora of all stages, each once."""
        return list(self._corpora.values())

    def count(self, config: RunConfig) -> RunConfig:
        """Return the run with the steps of its epochs, where these decide its length."""
        if config.schedule.steps:
            return config
        config = with_steps(config, self.stream.steps_of(config.schedule.epochs))
        self.stages = run_stages(config)  # the data of the stages has not changed, only their ends
        self._stage = self.stages[0]
        return config

    def lines(self) -> Iterator[str]:
        """Describe the data: where its tokens are, and how long an epoch of each stage is."""
        described: set[int] = set()
        for stage in self.stages:
            stream = self._streams[stage.number]
            if id(stream) not in described:
                yield from corpus_lines(self._corpora[stage.number], patches_per_token=PATCHES_PER_TOKEN)
            described.add(id(stream))
            name = f", stage {stage.name}" if stage.name else ""
            epoch_steps = stream.plan.steps
            steps = f"{count_of(stage.steps, 'step')} {'is' if stage.steps == 1 else 'are'}"
            epochs = f"; {steps} {stage.steps / epoch_steps:.3g} epochs" if epoch_steps else ""
            packs = count_of(stage.data.packs_per_step, "pack")
            yield f"data{name}: {count_of(epoch_steps, 'step')} per epoch of {packs}{epochs}"

    def take(self, number: int, *, is_over: Callable[[], bool] = lambda: False) -> Step:
        """Return this rank's share of step `number` of the run; steps must be taken in order.

        Raises WaitIsOver if `is_over` returns true while it waits for readers.
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
            "data: an epoch has fewer packs than data.packs_per_step, so it has no step. Add data, lower "
            "data.packs_per_step, or set data.remainder=keep"
        )

    def leave_out_bad_samples(self, step: Step, say: Callable[[str], None]) -> None:
        """Leave out samples that any rank could not read, from the next epoch on; every rank must call this."""
        bad = gather_lists(list(step.bad))
        for item in bad:
            say(f"left out: {item}")
        self.stream.quarantine(bad)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, which is the same on every rank."""
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any], *, done: int) -> None:
        """Continue at the position after `done` steps of the run."""
        self._stage = stage_of(self.stages, max(0, done - 1))
        self.stream.load_state_dict(state)
        self._steps = iter(())

    def _open(self, stage: Stage) -> None:
        """Open a stage's stream, or use that of the stage before if both read the same data."""
        before = self.stages[stage.number - 1] if stage.number else None
        if before is not None and before.data == stage.data and before.sp == stage.sp:
            self._streams[stage.number] = self._streams[before.number]
        else:
            self._corpora[stage.number], self._streams[stage.number] = open_data(
                stage.data, self.renderer, seed=self.seed, sequence=self.groups[stage.sp]
            )

    def _move(self, stage: Stage) -> None:
        """Enter a stage, and continue from the position of the stage before."""
        before, data_before = self.stream, self._stage.data
        self._stage = stage
        if self.stream is not before:
            position = before.state_dict()
            if stage.data != data_before:  # else only the number of ranks that share a row has changed
                position |= {"epoch": before.epoch + 1, "step": 0}
            self.stream.load_state_dict(position, changed=True)
            self._steps = iter(())


def take_together(data: RunData, number: int, watch: Watch, device: torch.device) -> Step:
    """Return this rank's share of a step that all ranks begin; every rank must call this.

    If a signal has asked any rank to stop, all raise Preempted, and none waits for its data any longer.
    """
    step = None
    watch.data(number)
    try:
        step = data.take(number, is_over=lambda: bool(watch.stop))
    except WaitIsOver as over:
        watch.broken_off = over
    watch.work(number, "the agreement to begin the step", keys_of(step.batches) if step is not None else ())
    require_no_wish(watch.stop, device)
    assert step is not None, "no data, although no rank was asked to stop"
    return step


def open_data(
    config: DataConfig, renderer: Renderer, *, seed: int, sequence: SequenceGroup | None = None
) -> tuple[Corpus, DataStream]:
    """Open a corpus and this rank's stream of it; every rank must call this."""
    corpus = open_together(config, renderer, section="data")
    share, shares = data_share(sequence)
    return corpus, open_stream(config, corpus, renderer, seed=seed, rank=share, size=shares)


def open_together(config: DataConfig, renderer: Renderer, *, section: str) -> Corpus:
    """Open a corpus on every rank, first on rank 0, which indexes and converts new files. Every rank must call this."""
    is_first = rank_and_world()[0] == 0
    corpus = open_corpus(config, renderer, section=section) if is_first else None
    barrier()
    return corpus or open_corpus(config, renderer, section=section)


def data_share(sequence: SequenceGroup | None) -> tuple[int, int]:
    """Return the number of this rank's share of a stream, and how many there are; a sequence group reads one share."""
    rank, world = rank_and_world()
    ranks_per_row = sequence.size if sequence is not None else 1
    return rank // ranks_per_row, world // ranks_per_row
