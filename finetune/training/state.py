"""The progress of a run, and how it is saved and resumed."""

from collections.abc import Mapping
from typing import Any

from data.format.printable import count_of
from finetune.checkpoint.adapter import reached
from finetune.checkpoint.folder import starting_point
from finetune.checkpoint.manifest import known_form, schedule_changes
from finetune.settings.recipes import effective
from finetune.training.setup import Run
from finetune.training.verdict import scores


class RunState:
    """The values of a run that change from step to step, besides its weights, its data and its judge."""

    def __init__(self, run: Run) -> None:
        self.first = 0
        """The first step of this start."""
        self.done = 0
        """The number of steps taken, including those of earlier starts."""
        self.saved = 0
        """The number of steps in the newest checkpoint."""
        self.owes_evaluation = False
        """True if the start before was stopped before it could evaluate after its last step."""
        self.provenance = run.provenance
        """The origin of the adapter, with the data and scores of the newest checkpoint."""
        self._run = run

    def resume(self) -> None:
        """Resume from the checkpoint that checkpoint.resume selects, if there is one; every rank must call this."""
        run = self._run
        path = starting_point(run.checkpoints.folder, run.config.checkpoint.resume)
        if path is None:
            return
        run.watch.stage("resume")
        resumed = run.checkpoints.restore(path, config=effective(run.config))
        self.first = self.done = self.saved = resumed.step
        with known_form(path):
            self.owes_evaluation = resumed.state.get("eval_owed", False)
            run.data.load_state_dict(resumed.state["data"], done=self.done)
            run.evaluation.judge.load_state_dict(resumed.state.get("eval", {}))
            self.provenance = reached(self.provenance, resumed.state)
        for line in schedule_changes(resumed.config, effective(run.config)):
            run.say(f"{line}; the {count_of(self.done, 'step')} taken had the same learning rates")
        steps_left = run.config.schedule.steps - self.done
        run.say(f"resumed: {path}, saved by {count_of(resumed.ranks, 'rank')}; {count_of(steps_left, 'step')} to go")

    def is_due(self) -> bool:
        """Return whether checkpoint.every_steps asks for a checkpoint now."""
        every = self._run.config.checkpoint.every_steps
        return every > 0 and self.done % every == 0

    def save_if_new(self, data: Mapping[str, Any], *, stop: int) -> None:
        """Save before the run ends, unless the newest checkpoint is from this step; every rank must call this."""
        if self.saved != self.done:
            self.save(data, stop=stop)
        self._run.checkpoints.wait()

    def save(self, data: Mapping[str, Any], *, stop: int, owes_evaluation: bool = False, is_best: bool = False) -> None:
        """Save the run as it is, with the state of its data; every rank must call this.

        A run that the signal `stop` ends waits until everything is written.
        """
        run = self._run
        run.watch.save(self.done, run.checkpoints.folder)
        judged = run.evaluation.judge.state_dict()
        state = {"data": data, "eval": judged, "scores": scores(judged), "eval_owed": owes_evaluation}
        self.provenance = reached(self.provenance, state)
        path = run.checkpoints.save(
            step=self.done, state=state, config=effective(run.config), is_best=is_best, wait=bool(stop)
        )
        is_under_way = run.config.checkpoint.asynchronous and not stop
        run.say(f"checkpoint: {path}" + (" is being written" if is_under_way else ""))
        self.saved = self.done
