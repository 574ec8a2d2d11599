"""Replays a saved step with a probe on every module, to find the first one that makes a value that is not finite."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from data.stream.batch import Batch, LossSums, loss_sums
from finetune.model.loss import normaliser, step_sums
from finetune.ranks.collectives import gather_lists, rank_and_world, sum_over_ranks
from finetune.ranks.engine import backward
from finetune.settings.recipes import effective
from finetune.training.bad_steps import restore_random, saved_rows
from finetune.training.setup import Run

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True, kw_only=True)
class NotFiniteValue:
    """The first value of one rank that is not finite; `place` orders those of several ranks."""

    place: tuple[int, int, int]  # micro-batch, forward (0) or backward (1), how many modules came before
    rank: int
    text: str


def not_finite_weights(model: nn.Module) -> list[str]:
    """Return the names of parameters and buffers with values on this rank that are not finite."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [_canonical(name) for name, tensor in tensors if _is_bad(getattr(tensor, "ds_tensor", tensor))]


class Probe:
    """Checks every output of every module, and every gradient that reaches one; keeps the first bad value."""

    def __init__(self, model: nn.Module) -> None:
        self.first: NotFiniteValue | None = None
        self.row(0, ())
        names = {module: _canonical(name) for name, module in model.named_modules() if name}
        self._hooks = [
            module.register_forward_hook(partial(self._forward, name), with_kwargs=False)
            for module, name in names.items()
        ]
        self._hooks += [
            parameter.register_hook(partial(self._parameter, _canonical(name)))  # type: ignore[no-untyped-call]  # torch's stub
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    def row(self, number: int, keys: Sequence[str]) -> None:
        """Begin a micro-batch."""
        self._row, self._keys = number, ", ".join(keys) or "a dummy row"
        self._modules_seen = 0
        self._last_finite = "the loss"

    def close(self) -> None:
        """Remove the probes."""
        for hook in self._hooks:
            hook.remove()

    def _forward(self, name: str, module: nn.Module, inputs: Any, outputs: Any) -> None:
        is_recomputed = torch._C._current_graph_task_id() != -1  # in backward
        self._modules_seen += 1
        for tensor in _tensors(outputs):
            if not is_recomputed and _is_bad(tensor):
                inputs_are_finite = not any(map(_is_bad, _tensors(inputs)))
                origin = ", from finite inputs" if inputs_are_finite else ""
                self._keep(0, f"the output of {name} ({type(module).__name__}){origin}")
            if tensor.requires_grad and not is_recomputed:
                tensor.register_hook(partial(self._gradient, name))  # type: ignore[no-untyped-call]  # torch's stub

    def _gradient(self, name: str, gradient: Tensor) -> None:
        self._modules_seen += 1
        if _is_bad(gradient):
            self._keep(1, f"the gradient of the output of {name}; it was still finite at {self._last_finite}")
        self._last_finite = name

    def _parameter(self, name: str, gradient: Tensor) -> None:
        self._modules_seen += 1
        if _is_bad(gradient):
            self._keep(1, f"the gradient of {name}")

    def _keep(self, phase: int, what: str) -> None:
        if self.first is None:
            rank, _ = rank_and_world()
            text = f"{what}, in {(FORWARD, BACKWARD)[phase]}, row {self._row} of rank {rank}: {self._keys}"
            self.first = NotFiniteValue(place=(self._row, phase, self._modules_seen), rank=rank, text=text)


def replay(run: Run, folder: Path) -> list[str]:
    """Take a saved step again without its update, and return sentences about values that are not finite.

    Every rank must call this.
    """
    rank, world = rank_and_world()
    run.watch.stage("resume")
    run.checkpoints.restore(folder, config=effective(run.config))
    run.watch.stage("replay")
    weights = sorted(set(gather_lists(not_finite_weights(run.model))))
    batches = saved_rows(folder, world if run.model.sequence is not None else None)
    probe = Probe(run.model)
    _take(run, list(_share(batches, rank, world)), probe, folder)
    probe.close()
    values = gather_lists([probe.first] if probe.first else [])
    first = min(values, key=lambda value: (value.place, value.rank), default=None)
    if first is None and not weights:
        return ["all outputs and gradients of all modules are finite in this replay"]
    sentences = [f"weights that are not finite: {', '.join(weights[:8])}{', ...' if len(weights) > 8 else ''}"]
    return [*(sentences if weights else []), *([f"first not finite: {first.text}"] if first else [])]


def _take(run: Run, rows: list[Batch], probe: Probe, folder: Path) -> None:
    """Run this rank's rows forward and backward, with the random states of the saved step."""
    sums = step_sums(sum(map(loss_sums, rows), LossSums()), run.device)
    total = normaliser(sums, run.config.loss.normalise)
    tokens = int(sum_over_ranks([sum(int((row.sample_ids >= 0).sum()) for row in rows)], run.device)[0])
    restore_random(folder)
    if run.balance is not None:
        run.balance.start_step(tokens)
    for number, row in enumerate(rows):
        probe.row(number, row.keys)
        sent = run.model.send(row, run.device).arrived()
        if run.balance is not None:
            run.balance.start_micro_batch(sent.valid_T)
        backward(run.engine, run.engine(batch=sent).objective, total)


def _share(rows: list[Batch], rank: int, world: int) -> Iterator[Batch]:
    """Yield this rank's rows, the same number on every rank: rows that fill up have no weight."""
    rows_per_rank = -(-len(rows) // world)
    for at in range(rank * rows_per_rank, (rank + 1) * rows_per_rank):
        if at < len(rows):
            yield rows[at]
        else:
            yield replace(rows[0], loss_weights=torch.zeros_like(rows[0].loss_weights))


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _is_bad(tensor: Any) -> bool:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return False
    with _disable_current_modes(), torch.no_grad():  # selective recompute pairs operations by their order
        return not bool(torch.isfinite(tensor.detach()).all())


def _canonical(name: str) -> str:
    """Return the name in the model's files; the wrapper adds a prefix to it."""
    return name.removeprefix("model.")
