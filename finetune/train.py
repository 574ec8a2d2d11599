"""The training loop, as one story: `torchrun --nproc_per_node N -m finetune.train CONFIG [key=value ...]`.

The same command starts a run and resumes it, on this number of ranks or another, from the newest checkpoint in its
folder. What it learned is written when the last step is done.
"""

import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from data.batch import Step
from data.sample import Renderer
from data.vision import read_spec
from finetune.adapter_file import open_adapter, write_adapter
from finetune.adapters import table_lines, trainable_table
from finetune.basefiles import open_base
from finetune.checkpoint import Checkpoints
from finetune.checkpoint_adapter import FOLDER, adapter_beside, reached
from finetune.checkpoint_manifest import best_checkpoint, read_manifest, starting_point
from finetune.checks import require
from finetune.config import RunConfig
from finetune.context import check_rotary
from finetune.derive import derive
from finetune.engine import backward, engine_config, engine_device, initialize, require_step_applied, start_distributed
from finetune.evaluate import Evaluation
from finetune.foresight import Foresight, settled
from finetune.forward import PackedModel
from finetune.gather import save
from finetune.groups import enter, set_rates, trained_groups
from finetune.hubconfig import read_family
from finetune.loss import normaliser, report, step_sums
from finetune.model import EmptyModel, build
from finetune.provenance import Provenance
from finetune.rank_log import RankLog
from finetune.ranks import barrier, rank_and_world, sum_over_ranks
from finetune.recipes import effective, load
from finetune.rehearse import rehearse
from finetune.sequence import sequence_groups
from finetune.sequence_attention import use_sequence
from finetune.setup import (
    context_lines,
    engine_options,
    fetch_base,
    make_balance,
    model_options,
    save_memory,
    share_rows,
)
from finetune.stages import run_stages, stage_of
from finetune.steps import RunData
from finetune.track import Tracker
from finetune.weights import load as load_weights
from moe.balance import Balance
from moe.load import StepLoad


def train(config: RunConfig, folder: Path, say: RankLog) -> None:
    """Train from a base to an adapter, or to a model where nothing is adapted; every rank must call this."""
    device = engine_device()
    stages = run_stages(config)
    say("\n".join(number.text for number in derive(config, ranks=rank_and_world()[1])))

    # --- the base, and the model on meta
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
    renderer = Renderer(base_folder, image=config.data.image, video=config.data.video, chat=config.data.chat)
    data = RunData(stages, renderer, seed=config.run.seed, groups=groups)
    say("\n".join(data.lines()))
    evaluation = Evaluation(config, renderer, families=trainable_table(empty), say=say)
    if rank_and_world()[0] == 0:
        say("\n".join(context_lines(empty.context, base, data.corpora, renderer, config.data)))

    # --- weights to ranks, engine
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
        beside=adapter_beside(empty, base=config.model.path, provenance=origin),
    )  # fmt: skip
    found_path, done = starting_point(folder / "checkpoints", config.checkpoint.resume), 0
    if found_path is not None:
        resumed = checkpoints.restore(found_path, config=effective(config))
        done = resumed.step
        data.load_state_dict(resumed.state["data"], done=done)
        evaluation.judge.load_state_dict(resumed.state.get("eval", {}))
        origin = reached(origin, resumed.state)
        say(f"resumed: {found_path}, saved by {resumed.ranks} ranks; {config.schedule.steps - done} steps to go")

    # --- steps
    with Tracker(config, folder, base=base, device=device, log=say, done=done) as tracker:
        share_rows(packed, balance, groups[stage_of(stages, done).sp])
        ended, is_over = done, evaluation.start(engine, done, record=tracker.evaluation)
        for at in range(done, done if is_over else config.schedule.steps):
            stage = stage_of(stages, at)
            if at in (done, stage.first):
                say(enter(engine, stage, at=at))
                share_rows(packed, balance, groups[stage.sp])
            checkpoints.poll()
            step = data.take(at)
            began = time.perf_counter()
            if at == 0:
                tracker.look(at, step.batches, packed.spec)
            rates = set_rates(engine, at, stage, config)
            found, load = _step(engine, step, config, balance, at, device)
            data.settle_bad_samples(step, say)
            seconds = time.perf_counter() - began + step.wait_seconds
            tracker.step(at, step, {**found, **rates}, load=load, seconds=seconds)
            foresight.after(at - done, seconds)
            every, last = config.checkpoint.every_steps, at + 1 == config.schedule.steps
            verdict = evaluation.after(engine, at + 1, last=last, record=tracker.evaluation)
            if last or verdict.stop or verdict.is_best or (every and (at + 1) % every == 0):
                state = {"data": data.state_dict(), "eval": evaluation.judge.state_dict()}
                origin = reached(origin, state)
                saved = checkpoints.save(step=at + 1, state=state, config=effective(config), is_best=verdict.is_best)
                say(f"checkpoint: {saved}" + (" is being written" if config.checkpoint.asynchronous else ""))
            ended = at + 1
            if verdict.stop:
                break
        checkpoints.wait()
        _write(empty, folder, origin, range(done, ended), say)
        _hand_over(folder, ended, tracker, say)


def _step(
    engine: Any, step: Step, config: RunConfig, balance: Balance | None, number: int, device: torch.device
) -> tuple[dict[str, float], StepLoad | None]:
    """One update; every rank must call this with its share of the same step."""
    sums = step_sums(step.sums, device)
    total = normaliser(sums, config.loss.normalise)
    if not total:
        raise ValueError(f"step {number}: not one token is supervised; look at the data with `moetune shards show`")
    tokens = int(sum_over_ranks([step.tokens], device)[0])
    if balance is not None:
        balance.start_step(tokens)
    objectives: list[torch.Tensor] = []
    for batch in step.batches:
        engine.set_gradient_accumulation_boundary(len(objectives) == len(step.batches) - 1)
        on_device = batch.to(device)
        if balance is not None:
            balance.start_micro_batch(engine.module.valid(on_device))
        losses = engine(batch=on_device)
        backward(engine, losses.objective, total)
        objectives.append(losses.objective.detach())
    load = balance.finish_step() if balance is not None else None
    found = dict(report(objectives, total, load))
    if not all(isfinite(value) for value in found.values()):
        raise RuntimeError(f"step {number}: the loss is not finite ({found}); the weights are those of the step before")
    engine.step()
    require_step_applied(engine, number)
    return {**found, "grad_norm": float(engine.get_global_grad_norm())}, load


def _hand_over(folder: Path, steps: int, tracker: Tracker, say: Callable[[str], None]) -> None:
    """Name the adapters of a run that has ended to whoever follows it: the last one, and the best."""
    if (folder / "adapter").exists():
        tracker.adapter(steps, folder / "adapter", aliases=["last"])
    best = best_checkpoint(folder / "checkpoints")
    if best is not None:
        say(f"best checkpoint: {best}")
        if (best / FOLDER).exists():
            tracker.adapter(read_manifest(best).step, best / FOLDER, aliases=["best"])


def _write(empty: EmptyModel, folder: Path, origin: Provenance, steps: range, say: Callable[[str], None]) -> None:
    """What was learned in all: an adapter, or the whole model where nothing was adapted.

    A run that was over when it started has it already; one that went on replaces it.
    """
    is_adapter = any(row.lora is not None for row in trainable_table(empty))
    place = folder / ("adapter" if is_adapter else "model")
    there = place.exists()
    barrier()  # all have looked before rank 0 changes anything
    if there and not steps:
        say(f"{place.name}: {place}, of an earlier start")
        return
    if there and rank_and_world()[0] == 0:
        shutil.rmtree(place)
    if is_adapter:
        ended = {"step": str(steps.stop)}
        for line in write_adapter(empty, place, base=origin.base_name, provenance=origin, extra=ended):
            say(f"warning: {line}")
    else:
        save(empty, place, origin.base.folder)
    say(f"{place.name}: {place}")


def main(argv: Sequence[str]) -> int:
    """Run one rank: CONFIG [key=value ...] [--dry-run], in the environment that torchrun or deepspeed made."""
    words = [word for word in argv if not word.startswith("--local_rank")]  # the deepspeed launcher puts it first
    is_dry = "--dry-run" in words
    words = [word for word in words if word != "--dry-run"]
    if not words or words[0].startswith("-"):
        print(
            "usage: torchrun --nproc_per_node N -m finetune.train CONFIG [key=value ...] [--dry-run]", file=sys.stderr
        )
        return 2
    # the engine calls collectives by names that torch 2.13 has renamed, thousands of times
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        config, problems = load(words[0], words[1:])
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        folder = Path("runs") / config.run.name
        config = config if any(p.level == "error" for p in problems) else settled(config, ranks=world)
        resuming = starting_point(folder / "checkpoints", config.checkpoint.resume) is not None
        warned = require(config, problems, ranks=world, resuming=resuming)
        if rank == 0:
            if not is_dry:
                _make_run_folder(folder, config)
            print("".join(f"warning: {problem}\n" for problem in warned), end="", file=sys.stderr, flush=True)
        start_distributed()
        if is_dry:
            return rehearse(config, folder, train)
        log = RankLog(folder / "logs", rank)
        log.take_streams()
        train(config, folder, log)
    except ValueError as error:
        print(f"moetune train, rank {rank_and_world()[0]}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _make_run_folder(folder: Path, config: RunConfig) -> None:
    if (folder / "metrics.jsonl").exists() and starting_point(folder / "checkpoints", config.checkpoint.resume) is None:
        raise ValueError(
            f"run.name: {folder} holds a run already, and no checkpoint to resume from. Set another run.name, or "
            f"remove that folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(effective(config))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
