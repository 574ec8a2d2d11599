"""The training loop, as one story: `torchrun --nproc_per_node N -m finetune.train CONFIG [key=value ...]`.

The same command starts a run and resumes it, on this number of ranks or another, from the newest checkpoint in its
folder. After the last step it writes the adapter or the model.
"""

import logging
import os
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from data.stream.batch import keys_of
from finetune.checkpoint.run_folder import make_run_folder
from finetune.checkpoint.run_lock import take_run
from finetune.config import RunConfig
from finetune.preflight.rank import rank_arguments
from finetune.ranks.collectives import Preempted, barrier, rank_and_world
from finetune.ranks.engine import end_distributed, start_distributed, take_device
from finetune.ranks.failures import end_at_failure, forget_failure, keep_outcome, report_early, report_failure
from finetune.ranks.log import RankLog
from finetune.ranks.signals import GUARDED, PREEMPTED, exit_code
from finetune.ranks.watch import Watch
from finetune.report.page import try_report
from finetune.tracking.summary import summary
from finetune.tracking.track import Tracker
from finetune.training.bad_steps import IdleSteps, saved_if_not_finite
from finetune.training.dry_run import rehearse
from finetune.training.optimiser_groups import enter, set_rates
from finetune.training.replay import replay
from finetune.training.results import hand_over, write_learned
from finetune.training.run_config import read_run
from finetune.training.setup import Run, assemble
from finetune.training.state import RunState
from finetune.training.steps import take_together
from finetune.training.update import take_step
from finetune.training.verdict import Verdict
from moetune_guard import require_fit


def train(
    config: RunConfig,
    folder: Path,
    say: RankLog,
    watch: Watch,
    *,
    replayed: Path | None = None,
    rehearses: bool = False,
) -> int:
    """Train from a base to an adapter, or to a model if nothing is adapted; every rank must call this.

    Returns the exit code. `replayed` is a saved step to replay instead. A run that `rehearses` evaluates one row of
    each source, and prints no summary.
    """
    # 1. Put the run together: base, data, weights, engine
    run = assemble(config, folder, say, watch, rehearses=rehearses)

    # 2. Replay a step, or continue where an earlier start stopped
    if replayed is not None:
        say("\n".join(replay(run, replayed)))
        return 0
    state = RunState(run)
    state.resume()

    with Tracker(run.config, folder, base=run.base, device=run.device, log=say, done=state.done) as tracker:
        tracker.begin(run.data.corpora)

        # 3. Evaluate before the first step; a run that was already over takes no steps
        run.share_rows(run.stage(state.first).sp)
        is_over = run.evaluation.start(run.engine, state.first, tracker=tracker, owed=state.owes_evaluation)

        # 4. Take the steps that are left
        signal = 0 if is_over else _take_steps(run, state, tracker)
        if signal:
            say(tracker.preempted(signal, done=state.done))
            return exit_code(signal)

        # 5. Write the result
        watch.stage("writing the result")
        run.checkpoints.wait()
        write_learned(run.empty, folder, state.provenance, range(state.first, state.done), say)
        hand_over(folder, state.done, tracker, say)

    # 6. Sum up
    judge = run.evaluation.judge
    is_guarded = bool(judge.tripped())
    if rank_and_world()[0] == 0:
        keep_outcome(say, "guarded" if is_guarded else "done", state.done)
        if not rehearses:
            reason = judge.stop()
            ending = f"stopped ({reason})" if reason else "done"
            say("\n".join(summary(config, folder, done=state.done, best=judge.best, ending=ending)))
    return GUARDED if is_guarded else 0


def _take_steps(run: Run, state: RunState, tracker: Tracker) -> int:
    """Take the steps of a run that are left; return the signal that ended it early, 0 for none."""
    config, watch = run.config, run.watch
    idle_steps = IdleSteps(config.run.idle_steps)
    for at in range(state.first, config.schedule.steps):
        # 4.1 Enter a stage
        stage = run.stage(at)
        if at in (state.first, stage.first):
            run.say(enter(run.engine, stage, at=at))
            run.share_rows(stage.sp)
            tracker.stage(stage.peaks)
        run.checkpoints.poll()

        # 4.2 Wait for data; if a signal asks for a stop, no rank begins the step
        data = run.data.state_dict()
        try:
            step = take_together(run.data, at, watch, run.device)
        except Preempted as wish:
            state.save_if_new(data, stop=wish.number)
            return wish.number

        # 4.3 Update the weights
        began = time.perf_counter()
        tracker.look(at, step.batches, run.model.spec, run.data.renderer)
        rates = set_rates(run.engine, at, stage, config)
        with saved_if_not_finite(run, at, step.batches):
            groups = run.groups if tracker.records_load(at) else None
            losses, load, by_sample = take_step(
                run.engine, step, config, run.balance, at, run.device, watch.work, groups
            )
        idle_steps.see(at, losses["loss"], keys_of(step.batches))
        run.data.leave_out_bad_samples(step, run.say)
        state.done = at + 1

        # 4.4 Record the step
        seconds = time.perf_counter() - began + step.wait_seconds
        figures = {**losses, **rates}
        signal = tracker.step(at, step, figures, load=load, by_sample=by_sample, seconds=seconds, stop=watch.stop)
        run.foresight.after(at - state.first, seconds, step.batches, sp=stage.sp)

        # 4.5 Evaluate; a run that a signal stops has no time for it, and evaluates when it is resumed
        is_last = state.done == config.schedule.steps
        verdict = Verdict()
        if is_last or not signal:
            verdict = run.evaluation.after(run.engine, state.done, tracker=tracker, last=is_last)
            signal = signal or verdict.preempted

        # 4.6 Save, and end early if a signal or the evaluation says so
        ends_early = bool(signal) and (not is_last or bool(verdict.preempted))
        if state.is_due() or is_last or signal or verdict.stop or verdict.is_best:
            state.save(run.data.state_dict(), stop=signal, owes_evaluation=ends_early, is_best=verdict.is_best)
        if ends_early:
            return signal
        if verdict.stop:
            break
    return 0


def main(argv: Sequence[str]) -> int:
    """Run one rank, as torchrun or deepspeed starts it."""
    args = rank_arguments(argv)
    # thousands of times, the engine calls collectives by names that torch 2.13 has deprecated
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    messages: list[str] = []
    try:
        take_device()  # what `auto` stands for may depend on the device's memory
        config, folder, problems = read_run(args.config, args.overrides, ranks=world)
        release = _hold(args, config, folder, messages)
        log = RankLog(folder.with_name(f"{folder.name}.dry-run.logs") if args.dry_run else folder / "logs", rank)
        forget_failure(log)
    except (ValueError, OSError) as error:
        return report_early(rank, error)
    watch = Watch(log, data_stall=config.data.stall_seconds, step_stall=config.run.stall_seconds, release=release)
    before, sys.excepthook = sys.excepthook, end_at_failure(log)
    try:
        log.take_streams()
        if rank == 0:
            messages += [f"warning: {problem}" for problem in problems]
            if messages:
                log.shout("\n".join(messages))
            if _trains(args):
                make_run_folder(folder, config)
        code = _run_with_others(args, config, folder, log, watch)
        if rank == 0 and _trains(args):
            log(try_report(folder))
    except ValueError as error:
        code = report_failure(log, error).code
        release()
        return code
    sys.excepthook = before
    release()
    log.close()
    if watch.broken_off is not None:  # do not wait for readers that may never end
        sys.stdout.flush()
        os._exit(code)
    return code


def _trains(args: Namespace) -> bool:
    return args.replay is None and not args.dry_run


def _hold(args: Namespace, config: RunConfig, folder: Path, messages: list[str]) -> Callable[[], None]:
    """Hold the run's folder, unless it is only read; return a function that releases it."""
    if not _trains(args):
        return lambda: None
    return take_run(folder, stall_seconds=config.run.stall_seconds, say=messages.append)


def _run_with_others(args: Namespace, config: RunConfig, folder: Path, log: RankLog, watch: Watch) -> int:
    """Meet the other ranks, train or rehearse, and leave them; return the exit code."""
    with watch.on():
        watch.together("start")
        is_ours = start_distributed()
        barrier()
        watch.stage("start", quiet=True)
        if args.dry_run:
            code = rehearse(config, folder, partial(train, rehearses=True), log, watch)
        else:
            code = train(config, folder, log, watch, replayed=args.replay)
        if is_ours:
            barrier()  # without a time limit: rank 0 may still be writing or uploading
            watch.together("end")
            end_distributed()
    return code


if __name__ == "__main__":
    require_fit(program=True)  # a foreign finetune/__init__.py has not checked this
    ended = main(sys.argv[1:])
    sys.stdout.flush()
    if ended in (0, PREEMPTED, GUARDED):
        sys.exit(ended)
    os._exit(ended)  # no library's clean-up waits for ranks that are gone
