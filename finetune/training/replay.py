"""A kept step once more, with a probe on every module: which was the first to make something that is not finite."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from data.stream.batch import Batch, LossSums, loss_sums
from finetune.model.forward import PackedModel
from finetune.model.loss import Normalise, normaliser, step_sums
from finetune.ranks.collectives import gather_lists, rank_and_world, sum_over_ranks
from finetune.ranks.engine import backward
from finetune.training.bad_steps import kept_rows, restore_random
from moe.balance import Balance

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The first thing that one rank found in one pass; `place` orders findings of several ranks."""

    place: tuple[int, int, int]  # micro-batch, forward (0) or backward (1), how many modules came before
    rank: int
    text: str


def not_finite_weights(model: nn.Module) -> list[str]:
    """Return names of this rank's parameters and buffers that are not finite, or whose part here is not."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [_canonical(name) for name, tensor in tensors if _bad(getattr(tensor, "ds_tensor", tensor))]


class Probe:
    """Looks at every output of every module, and at every gradient that reaches one; keeps the first finding."""

    def __init__(self, model: nn.Module) -> None:
        self.found: Finding | None = None
        self._row, self._keys, self._seen, self._last = 0, "", 0, "the loss"
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
        self._row, self._keys, self._seen, self._last = number, ", ".join(keys) or "a dummy row", 0, "the loss"

    def close(self) -> None:
        """Take the probes away."""
        for hook in self._hooks:
            hook.remove()

    def _forward(self, name: str, module: nn.Module, given: Any, made: Any) -> None:
        again = torch._C._current_graph_task_id() != -1  # recomputed in backward
        self._seen += 1
        for tensor in _tensors(made):
            if not again and _bad(tensor):
                whole = not any(map(_bad, _tensors(given)))
                self._keep(
                    0, f"the output of {name} ({type(module).__name__}){', from finite inputs' if whole else ''}"
                )
            if tensor.requires_grad and not again:
                tensor.register_hook(partial(self._gradient, name))  # type: ignore[no-untyped-call]  # torch's stub

    def _gradient(self, name: str, gradient: Tensor) -> None:
        self._seen += 1
        if _bad(gradient):
            self._keep(1, f"the gradient that reaches the output of {name}; it was finite at {self._last}")
        self._last = name

    def _parameter(self, name: str, gradient: Tensor) -> None:
        self._seen += 1
        if _bad(gradient):
            self._keep(1, f"the gradient of {name}")

    def _keep(self, phase: int, what: str) -> None:
        if self.found is None:
            text = (
                f"{what}, in {(FORWARD, BACKWARD)[phase]}, row {self._row} of rank {rank_and_world()[0]}: {self._keys}"
            )
            self.found = Finding(place=(self._row, phase, self._seen), rank=rank_and_world()[0], text=text)


def replay(
    engine: Any, packed: PackedModel, balance: Balance | None, folder: Path, *, normalise: Normalise,
    device: torch.device,
) -> list[str]:  # fmt: skip
    """Take a kept step again, but for its update; return what was found, in sentences. Every rank must call this."""
    rank, world = rank_and_world()
    weights = sorted(set(gather_lists(not_finite_weights(packed))))
    said = (
        [f"weights that are not finite: {', '.join(weights[:8])}{', ...' if len(weights) > 8 else ''}"]
        if weights
        else []
    )
    rows = list(_share(kept_rows(folder, world if packed.sequence is not None else None), rank, world))
    sums = step_sums(sum(map(loss_sums, rows), LossSums()), device)
    total = normaliser(sums, normalise)
    tokens = int(sum_over_ranks([sum(int((row.sample_ids >= 0).sum()) for row in rows)], device)[0])
    restore_random(folder)
    probe = Probe(packed)
    if balance is not None:
        balance.start_step(tokens)
    for number, row in enumerate(rows):
        probe.row(number, row.keys)
        sent = packed.send(row, device).arrived()
        if balance is not None:
            balance.start_micro_batch(sent.valid_T)
        backward(engine, engine(batch=sent).objective, total)
    probe.close()
    found = gather_lists([probe.found] if probe.found else [])
    first = min(found, key=lambda finding: (finding.place, finding.rank), default=None)
    if first is None and not weights:
        return ["all outputs and gradients of all modules are finite in this replay"]
    return [*said, *([f"first not finite: {first.text}"] if first else [])]


def _share(rows: list[Batch], rank: int, world: int) -> Iterator[Batch]:
    """This rank's rows, as many on every rank: repeated ones have no weight."""
    each = -(-len(rows) // world)
    for at in range(rank * each, (rank + 1) * each):
        if at < len(rows):
            yield rows[at]
        else:
            yield replace(rows[0], loss_weights=torch.zeros_like(rows[0].loss_weights))


def _tensors(made: Any) -> Iterator[Tensor]:
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, dict):
        for value in made.values():
            yield from _tensors(value)
    elif isinstance(made, (tuple, list)):
        for value in made:
            yield from _tensors(value)


def _bad(tensor: Any) -> bool:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return False
    with _disable_current_modes(), torch.no_grad():  # selective recompute pairs operations by their order
        return not bool(torch.isfinite(tensor.detach()).all())


def _canonical(name: str) -> str:
    """Names inside the wrapper are those of the model's files behind one prefix."""
    return name.removeprefix("model.")
