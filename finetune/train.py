"""The training loop, as one story: `torchrun --nproc_per_node N -m finetune.train CONFIG [key=value ...]`.

The same command starts a run and resumes it, on this number of ranks or another, from the newest checkpoint in its
folder. What it learned is written when the last step is done.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from data.render.sample import Renderer
from data.render.vision import read_spec
from data.stream.batch import keys_of
from finetune.adapters.file import open_adapter
from finetune.adapters.provenance import Provenance
from finetune.architecture.yarn import check_rotary
from finetune.checkpoint.adapter import adapter_writer, reached
from finetune.checkpoint.checkpoints import Checkpoints
from finetune.checkpoint.folder import starting_point
from finetune.config import RunConfig
from finetune.files.basefiles import open_base
from finetune.files.hubconfig import read_family
from finetune.files.hubfiles import stop_tokens
from finetune.model.build import build
from finetune.model.forward import PackedModel
from finetune.model.lora import table_lines, trainable_table
from finetune.model.sequence import sequence_groups
from finetune.model.sequence_attention import use_sequence
from finetune.model.weights import load as load_weights
from finetune.planner.foresight import Foresight, settled
from finetune.ranks.collectives import Preempted, barrier, rank_and_world
from finetune.ranks.engine import (
    NotFinite,
    end_distributed,
    engine_config,
    engine_device,
    initialize,
    start_distributed,
    take_device,
)
from finetune.ranks.failures import end_at_failure, forget_failure, keep_outcome, report_failure
from finetune.ranks.flight import record_flight
from finetune.ranks.log import RankLog
from finetune.ranks.signals import PREEMPTED, exit_code
from finetune.ranks.watch import Watch
from finetune.settings.checks import require
from finetune.settings.derive import derive
from finetune.settings.recipes import effective, load_recipe
from finetune.settings.stages import run_stages, stage_of
from finetune.training.bad_steps import IdleSteps, kept_step, random_states
from finetune.training.dry_run import rehearse
from finetune.training.evaluation import Evaluation
from finetune.training.optimiser_groups import enter, set_rates, trained_groups
from finetune.training.replay import replay
from finetune.training.results import hand_over, write_learned
from finetune.training.run_folder import make_run_folder
from finetune.training.setup import (
    context_lines,
    engine_options,
    fetch_base,
    make_balance,
    model_options,
    save_memory,
    share_rows,
)
from finetune.training.steps import RunData, take_together
from finetune.training.track import Tracker
from finetune.training.update import take_step
from finetune.training.verdict import Verdict, scores
from moetune_guard import require_fit


def train(config: RunConfig, folder: Path, say: RankLog, watch: Watch, *, kept: Path | None = None) -> int:
    """Train from a base to an adapter, or to a model where nothing is adapted; every rank must call this.

    Returns the signal that ended it before its last step, 0 for none. `kept` is a step to replay instead.
    """
    device = engine_device()
    stages = run_stages(config)
    say("\n".join(number.text for number in derive(config, ranks=rank_and_world()[1])))

    # --- the base, and the model on meta
    watch.stage("base and empty model")
    base_folder = fetch_base(config.model.path)
    base = read_family(base_folder)
    groups = sequence_groups(stage.sp for stage in stages)
    balance = make_balance(config, base, device)
    chosen = model_options(config, base, device, say)
    empty = build(base_folder, chosen, balance=balance)
    if max(groups) > 1:
        use_sequence(empty.module, groups, chosen.attention)
    say("\n".join(table_lines(trainable_table(empty))))

    # --- the data of every stage
    watch.stage("data")
    renderer = Renderer(base_folder, image=config.data.image, video=config.data.video, chat=config.data.chat)
    data = RunData(stages, renderer, seed=config.run.seed, groups=groups)
    say("\n".join(data.lines()))
    evaluation = Evaluation(
        config, renderer, families=trainable_table(empty), stops=partial(stop_tokens, base_folder),
        resident=chosen.resident, say=say, asked=lambda: watch.stop,
    )  # fmt: skip
    if rank_and_world()[0] == 0:
        say("\n".join(context_lines(empty.context, base, data.corpora, renderer, config.data)))

    # --- weights to ranks, engine
    watch.stage("weights and engine")
    options = engine_options(config)
    files = open_base(base_folder, empty.expected, layout=config.model.layout)
    start = open_adapter(Path(config.adapters.start_from)) if config.adapters.start_from else None
    loaded = load_weights(empty, files, engine_config=engine_config(options), start=start)
    say(f"loaded: rank 0 read {loaded.bytes_read:,} bytes and keeps {loaded.bytes_held:,}")
    foresight = Foresight(config, base, folder, say=say)
    foresight.weights(loaded.bytes_held)
    say(check_rotary(empty.module, base, empty.context))
    packed = PackedModel(empty.module, spec=read_spec(base_folder), normalise=config.loss.normalise)
    say(save_memory(packed, config))
    engine = initialize(packed, options, trained_groups(empty, stages))
    engine.train()
    torch.manual_seed(config.run.seed * 100_003 + rank_and_world()[0])  # dropout; a checkpoint brings its own state

    # --- where an earlier start of this run left off
    origin = Provenance(
        base=files, base_name=config.model.path, config=effective(config),
        parent=Path(config.adapters.start_from) if config.adapters.start_from else None,
    )  # fmt: skip
    checkpoints = Checkpoints(
        engine, empty, folder / "checkpoints", base=files, keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous,
        adapter_writer=adapter_writer(empty, base=config.model.path, provenance=origin), busy=watch.busy,
    )  # fmt: skip
    found_path, done, owed = kept or starting_point(folder / "checkpoints", config.checkpoint.resume), 0, False
    if found_path is not None:
        watch.stage("resume")
        resumed = checkpoints.restore(found_path, config=effective(config))
        if kept is not None:
            watch.stage("replay")
            say("\n".join(replay(engine, packed, balance, kept, normalise=config.loss.normalise, device=device)))
            return 0
        done, owed = resumed.step, resumed.state.get("eval_owed", False)
        data.load_state_dict(resumed.state["data"], done=done)
        evaluation.judge.load_state_dict(resumed.state.get("eval", {}))
        origin = reached(origin, resumed.state)
        say(f"resumed: {found_path}, saved by {resumed.ranks} ranks; {config.schedule.steps - done} steps to go")

    def save(steps: int, position: Mapping[str, Any], *, stop: int, owed: bool = False, is_best: bool = False) -> None:
        nonlocal origin
        watch.save(steps, checkpoints.folder)
        judged = evaluation.judge.state_dict()
        state = {"data": position, "eval": judged, "scores": scores(judged), "eval_owed": owed}
        origin = reached(origin, state)
        path = checkpoints.save(step=steps, state=state, config=effective(config), is_best=is_best, wait=bool(stop))
        say(f"checkpoint: {path}" + (" is being written" if config.checkpoint.asynchronous and not stop else ""))

    # --- steps
    saved = done
    watch.reading, idle = lambda: data.stream.reading(), IdleSteps(config.run.idle_steps)
    with Tracker(config, folder, base=base, device=device, log=say, done=done) as tracker:
        share_rows(packed, balance, groups[stage_of(stages, done).sp])
        watch.stage("evaluation")
        ended, is_over = done, evaluation.start(engine, done, tracker=tracker, owed=owed)
        for at in range(done, done if is_over else config.schedule.steps):
            stage = stage_of(stages, at)
            if at in (done, stage.first):
                say(enter(engine, stage, at=at))
                share_rows(packed, balance, groups[stage.sp])
                tracker.stage(stage.peaks)
            checkpoints.poll()
            before = data.state_dict()
            try:
                step = take_together(data, at, watch, device)
            except Preempted as wish:
                if saved != at:
                    save(at, before, stop=wish.number)
                checkpoints.wait()
                say(tracker.preempted(wish.number, done=at))
                return wish.number
            began = time.perf_counter()
            tracker.look(at, step.batches, packed.spec)
            rates, random = set_rates(engine, at, stage, config), random_states()
            try:
                found, load = take_step(engine, step, config, balance, at, device, watch.work)
            except NotFinite as error:
                watch.stage("keeping a step that is not finite")
                keeper = Checkpoints(engine, empty, folder / "replay", base=files, keep=1)
                raise kept_step(error, keeper, step.batches, random, at, effective(config)) from error
            idle.see(at, found["loss"], keys_of(step.batches))
            data.settle_bad_samples(step, say)
            seconds = time.perf_counter() - began + step.wait_seconds
            stop = tracker.step(at, step, {**found, **rates}, load=load, seconds=seconds, stop=watch.stop)
            foresight.after(at - done, seconds, step.batches, sp=stage.sp)
            every, last = config.checkpoint.every_steps, at + 1 == config.schedule.steps
            verdict = Verdict()
            if last or not stop:  # a run that is asked to stop has no time for it, and does it when it goes on
                watch.stage("evaluation", quiet=True)
                verdict = evaluation.after(engine, at + 1, last=last, tracker=tracker)
                stop = stop or verdict.preempted
            owed = bool(stop) and (not last or bool(verdict.preempted))
            if last or stop or verdict.stop or verdict.is_best or (every and (at + 1) % every == 0):
                save(at + 1, data.state_dict(), stop=stop, owed=owed, is_best=verdict.is_best)
                saved = at + 1
            ended = at + 1
            if owed:
                say(tracker.preempted(stop, done=ended))
                return stop
            if verdict.stop:
                break
        watch.stage("writing what was learned")
        checkpoints.wait()
        write_learned(empty, folder, origin, range(done, ended), say)
        hand_over(folder, ended, tracker, say)
    if rank_and_world()[0] == 0:
        keep_outcome(say, "done", ended)
    return 0


def main(argv: Sequence[str]) -> int:
    """Run one rank: CONFIG [key=value ...] [--dry-run | --replay FOLDER], as torchrun or deepspeed starts it."""
    since = time.time()
    words, is_dry, kept = _words(argv)
    if not words or words[0].startswith("-"):
        print(
            "usage: torchrun --nproc_per_node N -m finetune.train CONFIG [key=value ...] [--dry-run | --replay FOLDER]",
            file=sys.stderr,
        )
        return 2
    # the engine calls collectives by names that torch 2.13 has renamed, thousands of times
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        take_device()  # what is settled next may look at the device's memory
        config, problems = load_recipe(words[0], words[1:])
        folder = Path("runs") / config.run.name
        config = config if any(p.level == "error" for p in problems) else settled(config, ranks=world)
        resuming = starting_point(folder / "checkpoints", config.checkpoint.resume) is not None
        warned = require(config, problems, ranks=world, resuming=resuming)
    except ValueError as error:
        print(f"moetune train, rank {rank}: {error}", file=sys.stderr, flush=True)
        return 2
    log = RankLog(folder.with_name(f"{folder.name}.dry-run.logs") if is_dry else folder / "logs", rank)
    watch = Watch(log, data_stall=config.data.stall_seconds, step_stall=config.run.stall_seconds)
    forget_failure(log)
    before, sys.excepthook = sys.excepthook, end_at_failure(log, since=since)
    try:
        log.take_streams()
        if rank == 0:
            if kept is None and not is_dry:
                make_run_folder(folder, config)
            log.shout("\n".join(f"warning: {problem}" for problem in warned)) if warned else None
        with watch.on():
            record_flight(log.folder)
            watch.together("start")
            is_ours = start_distributed()
            barrier()
            watch.stage("start", quiet=True)
            if is_dry:
                code = rehearse(config, folder, train, log, watch)
            else:
                code = exit_code(train(config, folder, log, watch, kept=kept))
            if is_ours:
                barrier()  # rank 0 may still hand things over, for as long as it takes
                watch.together("end")
                end_distributed()
    except ValueError as error:
        return report_failure(log, error, since=since).code
    sys.excepthook = before
    log.close()
    if watch.broken_off is not None:  # readers that may never end are not waited for
        sys.stdout.flush()
        os._exit(code)
    return code


def _words(argv: Sequence[str]) -> tuple[list[str], bool, Path | None]:
    """The recipe and its overrides, whether it is a dry run, and the kept step to replay."""
    words = [word for word in argv if not word.startswith("--local_rank")]  # the deepspeed launcher puts it first
    is_dry = "--dry-run" in words
    words = [word for word in words if word != "--dry-run"]
    kept = [Path(after) for word, after in pairwise(words) if word == "--replay"]
    if kept:
        at = words.index("--replay")
        words[at : at + 2] = []
    return words, is_dry, kept[0] if kept else None


if __name__ == "__main__":
    require_fit(program=True)  # a foreign finetune/__init__.py did not ask
    ended = main(sys.argv[1:])
    sys.stdout.flush()
    if ended in (0, PREEMPTED):
        sys.exit(ended)
    os._exit(ended)  # no library's clean-up waits for ranks that are gone
