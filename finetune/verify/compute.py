"""The computed checks of a base's card: our model against transformers' on the same samples, both streamed.

Their inputs differ on purpose. Ours gets the input of training: all samples packed in one row, four rows of positions,
no mask, weights read by this package. Transformers' gets the input of its users: a padded batch with a mask, its own
positions, weights read by the safetensors library and transposed by transformers' rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from data.render.vision import normalise, read_spec
from finetune.architecture.shapes import EMBEDDING, HEAD, is_expert_stack
from finetune.files.basefiles import BaseFiles
from finetune.files.fp8 import BLOCK
from finetune.files.layouts import single_expert
from finetune.files.tensorfile import Stored
from finetune.model.build import build
from finetune.model.empty import EmptyModel, ModelOptions
from finetune.model.weights import rebuild_tables
from finetune.ranks.device import open_device
from finetune.verify.card import Check
from finetune.verify.samples import LAYOUTS, Trial, trials
from finetune.verify.streaming import Read, streamed

_SPREAD = 12  # positions compared in each sample, in addition to those that predict its answer
_PREFERENCE = 0.05  # nats per token, and every video must prefer the same layout; random weights stay below this


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The allowed difference of logits, in their standard deviations, and which share of next tokens must be equal.

    Rounding to bfloat16 swaps experts with nearly equal scores, which can change single positions by any amount.
    """

    worst: float
    typical: float
    equal: float


TOLERANCES = {
    "float32": Tolerance(worst=2e-3, typical=1e-4, equal=0.99),
    "bfloat16": Tolerance(worst=float("inf"), typical=0.1, equal=0.9),
}


@dataclass(frozen=True, kw_only=True)
class TrialSet:
    """The samples of a comparison, the positions compared in each, and the pixels that both models get."""

    trials: Sequence[Trial]
    chosen: Sequence[list[int]]
    pixels: dict[str, Tensor]

    @property
    def packed(self) -> Tensor:
        """Indexes of the chosen positions in the packed row."""
        starts = np.cumsum([0, *(len(trial.sample.input_ids) for trial in self.trials)])
        return torch.tensor(
            [starts[number] + position for number, positions in enumerate(self.chosen) for position in positions]
        )

    @property
    def padded(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the chosen positions in the padded batch."""
        pairs = [(row, column) for row, columns in enumerate(self.chosen) for column in columns]
        return torch.tensor([row for row, _ in pairs]), torch.tensor([column for _, column in pairs])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One model's run: logits and outputs of text layers at the chosen positions, and the peak bytes of its weights."""

    logits: Tensor
    layers: dict[str, Tensor]
    bytes_peak: int


def compute_checks(
    folder: Path, weights: BaseFiles, *, device: str, dtype_name: Literal["float32", "bfloat16"]
) -> Iterator[Check]:
    """Compare the logits of both models on every sample, then the cost of the answers in each video layout."""
    dtype, place = getattr(torch, dtype_name), open_device(device)
    samples = trial_set(folder, trials(folder), place, dtype)
    ours = _run_ours(folder, weights, samples, place, dtype)
    theirs = _run_theirs(folder, weights, samples, place, dtype)
    yield compare(samples.chosen, [trial.name for trial in samples.trials], ours, theirs, TOLERANCES[dtype_name])
    yield video_preference(samples.trials, samples.chosen, ours.logits)


def compare(
    chosen: Sequence[list[int]], names: Sequence[str], ours: Outcome, theirs: Outcome, allowed: Tolerance
) -> Check:
    """Check that logits are close and next tokens equal; a failure names the sample and the first differing layer."""
    apart = (ours.logits.float() - theirs.logits.float()).abs().amax(-1) / theirs.logits.float().std()
    equal = ours.logits.argmax(-1) == theirs.logits.argmax(-1)
    detail = (
        f"{len(apart)} positions of {len(names)} samples: largest difference {apart.max():.1e} of the logits' spread, "
        f"typical {apart.median():.1e}, next token equal at {int(equal.sum())}; at most "
        f"{max(ours.bytes_peak, theirs.bytes_peak):,} bytes of weights in memory"
    )
    # written so that a NaN fails, because all comparisons with it are false
    sound = apart.max() <= allowed.worst and apart.median() <= allowed.typical and equal.float().mean() >= allowed.equal
    if sound:
        return Check(name="logits", status="pass", detail=detail)
    ends = np.cumsum([len(places) for places in chosen])
    sample = names[int(np.searchsorted(ends, int(apart.argmax()), side="right"))]
    return Check(
        name="logits", status="fail", detail=f"{detail}; worst in {sample}; {_parting(ours, theirs, allowed.typical)}"
    )


def video_preference(trials: Sequence[Trial], chosen: Sequence[list[int]], logits: Tensor) -> Check:
    """Note the cost of the given answers, in nats per token, in each video layout: the weights prefer the cheapest."""
    costs: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    at = 0
    for trial, places in zip(trials, chosen, strict=True):
        if trial.layout is not None:
            labels = _answer(trial)
            rows = torch.tensor([at + places.index(label - 1) for label in labels])
            targets = torch.from_numpy(trial.sample.input_ids[labels].astype(np.int64)).to(logits.device)
            costs[trial.layout].append(F.cross_entropy(logits[rows].float(), targets).item())
        at += len(places)
    mean = {layout: sum(each) / len(each) for layout, each in costs.items()}
    low, high = sorted(LAYOUTS, key=mean.__getitem__)
    gap = mean[high] - mean[low]
    wins = sum(first < second for first, second in zip(costs[low], costs[high], strict=True))
    clear = gap >= _PREFERENCE and wins == len(costs[low])
    verdict = f"the weights prefer {low}" if clear else "no clear preference"
    verdict += f" ({low} cheaper in {wins} of {len(costs[low])})"
    shown = ", ".join(f"{layout} {cost:.3f}" for layout, cost in mean.items())
    return Check(name="video layout", status="note", detail=f"answers cost {shown} nats per token: {verdict}")


def _parting(ours: Outcome, theirs: Outcome, typical: float) -> str:
    """Name the first layer after which the models differ by more than ten times the typical difference."""
    for name, output in theirs.layers.items():
        if not (ours.layers[name] - output).abs().max() / output.float().std() <= 10 * typical:
            return f"the models first differ at {name}"
    return "the layers agree, but the head differs"


def trial_set(folder: Path, samples: Sequence[Trial], device: torch.device, dtype: torch.dtype) -> TrialSet:
    """Choose the positions to compare in each sample, and concatenate the pixels of all samples."""
    chosen = []
    for trial in samples:
        spread = np.linspace(0, len(trial.sample.input_ids) - 1, _SPREAD).astype(int).tolist()
        chosen.append(sorted({*spread, *(label - 1 for label in _answer(trial))}))
    spec, pixels = read_spec(folder), {}
    for kind, suffix in (("image", ""), ("video", "_videos")):
        patches = np.concatenate([getattr(trial.sample, f"{kind}_patches") for trial in samples])
        grids = np.concatenate([getattr(trial.sample, f"{kind}_grids") for trial in samples])
        if not len(grids):
            continue
        pixels[f"pixel_values{suffix}"] = normalise(torch.from_numpy(patches).to(device), spec=spec, dtype=dtype)
        pixels[f"{kind}_grid_thw"] = torch.from_numpy(grids).long().to(device)
    return TrialSet(trials=samples, chosen=chosen, pixels=pixels)


def _answer(trial: Trial) -> list[int]:
    """Return the positions of the answer's tokens."""
    return [int(place) for place in np.flatnonzero(trial.sample.loss_weights)]


def _run_ours(folder: Path, weights: BaseFiles, samples: TrialSet, device: torch.device, dtype: torch.dtype) -> Outcome:
    return run_packed(build(folder, ModelOptions(dtype=dtype)), weights.read, samples, weights, device, dtype)


def run_packed(
    empty: EmptyModel, read: Read, samples: TrialSet, weights: BaseFiles, device: torch.device, dtype: torch.dtype
) -> Outcome:
    """Run our model on all samples in one row, as training does, with weights from `read`."""
    ids = np.concatenate([trial.sample.input_ids for trial in samples.trials])
    positions = np.concatenate([trial.sample.positions for trial in samples.trials], axis=1)
    inputs = {
        "input_ids": torch.from_numpy(ids).long()[None],
        "position_ids": torch.from_numpy(positions).long()[:, None],
    }
    places = (torch.zeros_like(samples.packed), samples.packed)
    return run_streamed(empty.module, read, empty.canonical, inputs, samples.pixels, places, weights, device, dtype)


def _run_theirs(
    folder: Path, weights: BaseFiles, samples: TrialSet, device: torch.device, dtype: torch.dtype
) -> Outcome:
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        module = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    longest = max(len(trial.sample.input_ids) for trial in samples.trials)
    ids = torch.full((len(samples.trials), longest), int(config.text_config.bos_token_id))
    mask = torch.zeros_like(ids)
    for at, trial in enumerate(samples.trials):
        ids[at, : len(trial.sample.input_ids)] = torch.from_numpy(trial.sample.input_ids).long()
        mask[at, : len(trial.sample.input_ids)] = 1
    kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}
    read = library_reader(weights)
    return run_streamed(module, read, lambda name: name, inputs, samples.pixels, samples.padded, weights, device, dtype)


def run_streamed(
    module: nn.Module,
    read: Read,
    canonical: Any,
    inputs: dict[str, Tensor],
    pixels: dict[str, Tensor],
    places: tuple[Tensor, Tensor],
    weights: BaseFiles,
    device: torch.device,
    dtype: torch.dtype,
) -> Outcome:
    """Run a meta model with one layer in memory at a time, and return its logits at `places`."""
    module.eval()
    rebuild_tables(module, device)
    inner: nn.Module = module.get_submodule("model")  # without the head, which is needed at the chosen positions only
    rows, columns = (place.to(device) for place in places)

    def watch(name: str, output: Any) -> Tensor | None:
        is_text_layer = ".layers." in name and isinstance(output, Tensor)
        return output[rows, columns].clone() if is_text_layer else None

    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
    with (
        torch.no_grad(),
        streamed(
            inner,
            read,
            canonical=lambda name: canonical(f"model.{name}"),
            device=device,
            dtype=dtype,
            watch=watch,
        ) as state,
    ):
        hidden = inner(**moved, **pixels, use_cache=False).last_hidden_state[rows, columns]
        head = read(HEAD if HEAD in weights.shapes else EMBEDDING).to(device=device, dtype=dtype)
        logits = F.linear(hidden, head)
    return Outcome(logits=logits, layers=state.outputs, bytes_peak=max(state.bytes_peak, head.nbytes))


def library_reader(weights: BaseFiles) -> Read:
    """Return a function that reads tensors with the safetensors library.

    It transposes expert stacks by transformers' rule: if their shape differs from the expected one. Codes in fp8 become
    float32 by torch's own conversion, because transformers reads no experts in fp8.
    """

    def loaded(tensor: Stored) -> Tensor:
        with safe_open(tensor.file, framework="pt") as file:
            values: Tensor = file.get_tensor(tensor.name)
        return values

    def stored(key: str) -> Tensor:
        tensor = loaded(weights.stored[key])
        if key not in weights.scales:
            return tensor
        scales = loaded(weights.scales[key]).float()
        for dim in (-2, -1):
            scales = scales.repeat_interleave(BLOCK, dim).narrow(dim, 0, tensor.shape[dim])
        return tensor.float() * scales

    def read(name: str) -> Tensor:
        shape = weights.shapes[name]
        if weights.layout == "per_expert" and is_expert_stack(name):
            experts = [single_expert(name, shape, expert) for expert in range(shape[0])]
            return torch.stack([torch.cat([stored(key) for key, _ in keys]) for keys in experts])
        tensor = stored(name)
        turned = is_expert_stack(name) and tuple(tensor.shape) != tuple(shape)
        return tensor.transpose(1, 2).contiguous() if turned else tensor

    return read
