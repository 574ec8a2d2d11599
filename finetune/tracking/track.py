"""Keeps track of a run: metrics, expert load, evaluations, predictions and pictures, in its folder and beyond."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from signal import Signals
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from data.format.printable import count_of
from data.render.sample import Renderer
from data.render.vision import VisionSpec
from data.stream.batch import Batch, Step
from data.stream.corpus import Corpus
from finetune.architecture.families import Family
from finetune.architecture.flops import FlopMeter, trainings
from finetune.config import RunConfig
from finetune.planner.gpus import peak_flops
from finetune.ranks.collectives import rank_and_world
from finetune.ranks.failures import keep_outcome
from finetune.ranks.log import RankLog, print_line
from finetune.settings.recipes import effective
from finetune.tracking.metrics import Ranks, figures, gather_shares, load_figures, share_of
from finetune.tracking.progress_bar import Follower
from finetune.tracking.records import forget_steps, records
from finetune.tracking.seen_samples import chosen_samples
from finetune.tracking.start_record import start_record
from finetune.tracking.summary import work_line
from finetune.tracking.token_groups import counts_by_group, run_sources
from finetune.tracking.wandb_link import WandbLink
from moe.expert_load import StepLoad

if TYPE_CHECKING:
    from finetune.tracking.tensorboard_writer import TensorBoard


class Tracker:
    """Records one start of a run, from its step `done` on; use it as a context, so that it is always closed."""

    def __init__(
        self, config: RunConfig, folder: Path, *, base: Family, device: torch.device, log: RankLog, done: int
    ) -> None:
        rank, world = rank_and_world()
        self._config, self._folder = config, folder
        self._device, self._log = device, log
        self._base, self._meter = base, FlopMeter(base, trainings(config.adapters))
        peak, reason = _peak(config, device)
        self._ranks = Ranks(world=world, peak_flops=peak)
        self._writes = rank == 0
        self._done = done
        self._moe_layers = list(base.moe_layers) if base.text.experts is not None else []
        self._preempted = False
        self._sources = run_sources(config)
        self._link: WandbLink | None = None
        self._board: TensorBoard | None = None
        if not self._writes:
            return
        if peak is None:
            log(f"mfu is null in metrics.jsonl: {reason}")
        # evaluations and predictions are numbered by the steps done; a run without a save starts again at 0
        judged = done + 1 if done else 0
        ends = {"metrics": done, "expert_load": done, "samples": done, "evaluations": judged, "predictions": judged}
        for kind, end in ends.items():
            if damaged := forget_steps(folder / f"{kind}.jsonl", end):
                log(f"warning: {folder / kind}.jsonl: {count_of(damaged, 'damaged line')} removed; the run continues")
        if config.track.wandb != "off":
            self._link = WandbLink(
                config.track,
                folder,
                name=config.run.name,
                settings=effective(config) | {"ranks": world},
                done=done,
                warn=log,
            )
        if config.track.tensorboard:
            self._board = _open_board(folder, ends)
        evaluations = records(folder / "evaluations.jsonl")
        self._follower = Follower(
            log,
            done=done,
            steps=config.schedule.steps,
            evaluates_every=config.eval.every_steps if config.eval.sources else None,
            evaluation_seconds=float(evaluations[-1]["seconds"]) if evaluations else 0.0,
        )
        log.show = self._follower.print

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writes:
            self._follower.close()
            self._log.show = print_line
            if self._board is not None:
                self._board.close()
            if self._link is None:
                return
            if kind is None:
                self._link.close(code=int(self._preempted), preempted=self._preempted)
            else:
                self._link.abandon()  # nothing may delay the report of the failure

    def begin(self, corpora: Iterable[Corpus]) -> None:
        """Record that this start begins, with the sizes and licences of its sources, in starts.jsonl."""
        if self._writes:
            world = self._ranks.world
            start = start_record(self._config, corpora, done=self._done, ranks=world, device=self._device)
            self._append("starts", start)

    def step(
        self,
        at: int,
        step: Step,
        losses: Mapping[str, Any],
        *,
        load: StepLoad | None,
        by_sample: Sequence[float],
        seconds: float,
        stop: int = 0,
    ) -> int:
        """Gather the figures of a step, write and show them; every rank must call this, with the step as it was read.

        `losses` are the same on all ranks, `by_sample` is this rank's part of the loss of each of its samples. Returns,
        on every rank, the signal that any of them received; 0 for none.
        """
        share = share_of(step, seconds=seconds, stop=stop, sources=self._sources, losses=by_sample)
        shares = gather_shares(share, self._device)
        if self._writes:
            values = {"step": at, "epoch": step.epoch}
            values |= {**figures(shares, self._meter, self._ranks), **load_figures(load), **losses}
            self._write("metrics", values)
            line = self._follower.step(values)
            if self._follower.is_bar:  # otherwise it is in the log already
                self._log.note(line)
            if load is not None and self.records_load(at):
                counts = {"counts": load.counts, **counts_by_group(load, self._sources)}
                self._write("expert_load", {"step": at, "layers": self._moe_layers, **counts})
        return max(share.stop for share in shares)

    def records_load(self, at: int) -> bool:
        """Say whether the load of each expert is recorded in this step."""
        every = self._config.track.load_every
        return bool(every) and at % every == 0

    def stage(self, parts: Collection[str]) -> None:
        """Note the parts of the model that train from now on: they decide what counts as work."""
        of_stage = {part: training for part, training in trainings(self._config.adapters).items() if part in parts}
        self._meter = FlopMeter(self._base, of_stage, recompute=self._config.parallel.recompute)

    def evaluation(self, numbers: Mapping[str, Any]) -> None:
        """Write the numbers of an evaluation by name; `step` is the number of steps done."""
        if self._writes:
            self._write("evaluations", numbers)
            self._follower.evaluation(float(numbers["seconds"]))

    def predictions(self, steps: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the answers of the model after `steps` steps: rows of texts and numbers with the same names."""
        if self._writes and rows:
            self._write("predictions", {"step": steps, "rows": [dict(row) for row in rows]})

    def adapter(self, steps: int, folder: Path, *, aliases: Sequence[str]) -> None:
        """Send a finished adapter folder to W&B, with aliases like `last` and `best`."""
        if self._link is not None:
            self._link.send("adapter", {"step": steps, "folder": str(folder.absolute()), "aliases": list(aliases)})

    def look(self, at: int, batches: Iterable[Batch], spec: VisionSpec | None, renderer: Renderer) -> None:
        """Write a few samples of a run's first step as the model sees them: samples.jsonl, and pictures in media/."""
        most = self._config.track.media_samples
        if at or not self._writes or not most:
            return
        media = self._folder / "media"
        files: list[tuple[str, str]] = []  # each file with the key of its sample
        media_ids = (self._base.image_token_id, self._base.video_token_id)
        for sample in chosen_samples(batches, spec, media_ids=media_ids, most=most):
            first = len(files)
            for frame in sample.frames[: most - first]:
                media.mkdir(exist_ok=True)
                file = media / f"step-{at:06d}-{len(files)}.png"
                Image.fromarray(frame.pixels()).save(file)
                files.append((str(file.absolute()), sample.key))
            pictures = [f"media/{Path(file).name}" for file, _ in files[first:]]
            self._append("samples", {"step": at, **sample.record(renderer), "pictures": pictures})
        if self._link is not None and self._config.track.media == "wandb" and files:
            self._link.send("pictures", {"step": at, "files": files})

    def preempted(self, number: int, *, done: int) -> str:
        """Record that a signal ends this start after `done` steps, and return a message about it."""
        self._preempted = True
        text = (
            f"stopped by {Signals(number).name} after {count_of(done, 'step')}; the same command continues from there"
        )
        if self._writes:
            keep_outcome(self._log, "preempted", done)
            steps, evaluations = (records(self._folder / f"{kind}.jsonl") for kind in ("metrics", "evaluations"))
            text += f"\nso far: {work_line(steps, evaluations, done=done)}"
        return text

    def _append(self, kind: str, values: Mapping[str, Any]) -> None:
        with (self._folder / f"{kind}.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def _write(self, kind: str, values: Mapping[str, Any]) -> None:
        self._append(kind, values)
        if self._link is not None:
            self._link.send(kind, values)
        if self._board is not None:
            self._board.write(kind, values)


def _open_board(folder: Path, begins: Mapping[str, int]) -> "TensorBoard":
    from finetune.tracking.tensorboard_writer import TensorBoard  # its package is optional

    return TensorBoard(folder, begins)


def _peak(config: RunConfig, device: torch.device) -> tuple[float | None, str]:
    """Return the peak FLOP/s of one device; or None, and why it is unknown."""
    if device.type != "cuda":
        return None, "the peak of a CPU is unknown"
    if config.model.dtype != "bfloat16":
        return None, f"only peaks in bfloat16 are known, and model.dtype is {config.model.dtype}"
    name = torch.cuda.get_device_name(device)
    return peak_flops(name), f"the peak of {name!r} is unknown"
