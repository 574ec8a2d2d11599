"""The proof of a merge: logits of the merged files against base and separate adapter, on samples, layer by layer.

Base and adapter are computed as in training: low-rank parts are added to the outputs of matrices and grouped GEMMs. So
the proof shares neither arithmetic nor layout with the merge. One layer of one model is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.config import DataConfig
from data.prepare.converted import shards_of_rows
from data.render.sample import Renderer
from data.rows.files import RowSource, is_rows
from data.shards.bytes import Places
from data.shards.find import find_shards
from data.shards.reader import SampleReader
from finetune.adapters.change import Change
from finetune.adapters.keys import packed_stack
from finetune.adapters.media import rules_of, trained_rules
from finetune.adapters.merge_plan import MergePlan
from finetune.adapters.source import AdapterSource
from finetune.architecture.shapes import HEAD, is_expert_stack
from finetune.files.basefiles import BaseFiles, open_base
from finetune.files.tensorfile import FP8
from finetune.model.build import build
from finetune.model.empty import EmptyModel, ModelOptions
from finetune.ranks.device import open_device
from finetune.verify.codes import Codes, compare_codes
from finetune.verify.compute import Outcome, TrialSet, run_packed, trial_set
from finetune.verify.samples import Trial, trials
from moe.experts import ExpertLora
from moe.names import PEFT_PREFIX
from moe.parallel import LayerOptions

_GEMM_ROWS = 8  # a grouped GEMM needs a multiple of this for the experts' r; added rows of zeros change nothing
_WORST = {"F32": 1e-3}
_TYPICAL = {"F32": 1e-4}
_TYPICAL_NARROW = 0.1


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Distances of the merged model and of the base alone from base plus adapter, in spreads of the logits.

    Quantising moves logits further than some adapters do, so fp8 files are judged by their codes, and `kl` (in nats)
    and `equal` state what quantising costs.
    """

    positions: int
    samples: int
    worst: float
    typical: float
    equal: float
    moved: float
    """The typical distance by which the adapter changes the base's logits."""
    stored: str
    bytes_peak: int
    kl: float = 0.0
    codes: Codes | None = None
    media: tuple[str, ...] = ()
    """Differences between training and the merged folder's processor files in preparing images and videos."""

    @property
    def passed(self) -> bool:
        """Return whether the merge is close to base plus adapter, and closer than the base; a NaN fails."""
        if self.codes is not None:
            return not self.media and self.codes.sound and math.isfinite(self.kl)
        close = self.worst <= _WORST.get(self.stored, float("inf"))
        near = self.typical <= _TYPICAL.get(self.stored, _TYPICAL_NARROW)
        return not self.media and close and near and self.equal >= 0.9 and self.typical < self.moved

    def line(self) -> str:
        """Return the result in one line."""
        media = f"the processor files say {'; '.join(self.media)}" if self.media else "images and videos as in training"
        return (
            f"{'proved' if self.passed else 'FAILED'}   {self.positions} positions of {self.samples} samples: the "
            f"merged {self.stored} files are {self.typical:.1e} of the logits' spread from base + adapter (largest "
            f"{self.worst:.1e}), which is {self.moved:.1e} from the base; KL {self.kl:.1e} nats, next token equal at "
            f"{self.equal:.1%}; at most {self.bytes_peak:,} bytes of weights in memory; {media}"
            + (f"; {self.codes.line()}" if self.codes is not None else "")
        )


def prove(merged: Path, plan: MergePlan, samples: Sequence[Trial], *, device: str) -> Proof:
    """Compute in float32 the outputs of the merged folder, of base plus adapter, and of the base, and compare them."""
    base = plan.base
    place, dtype = open_device(device), torch.float32
    inputs = trial_set(merged, samples, place, dtype)
    files = open_base(merged)
    options = ModelOptions(dtype=dtype)
    in_one = run_packed(build(merged, options), files.read, inputs, files, place, dtype)
    longer = ModelOptions(dtype=dtype, context=plan.context)
    before = run_packed(build(base.folder, longer), base.read, inputs, base, place, dtype)
    intended = _apart(plan, inputs, place)
    spread = intended.logits.std()
    distance = (in_one.logits - intended.logits).abs().amax(-1) / spread
    trained = rules_of(base.folder) if plan.data is None else trained_rules(base.folder, plan.data)
    moved = (before.logits - intended.logits).abs().amax(-1) / spread
    expected, got = (run.logits.double().log_softmax(-1) for run in (intended, in_one))
    kinds = set(files.dtypes.values())
    return Proof(
        positions=len(distance),
        samples=len(samples),
        worst=float(distance.max()),
        typical=float(distance.median()),
        equal=float((in_one.logits.argmax(-1) == intended.logits.argmax(-1)).float().mean()),
        moved=float(moved.median()),
        kl=float((expected.exp() * (expected - got)).sum(-1).mean()),
        codes=compare_codes(files, plan) if FP8 in kinds else None,
        stored="/".join(sorted(kinds)),
        bytes_peak=max(run.bytes_peak for run in (in_one, before, intended)),
        media=tuple(rules_of(merged).differences(trained)),
    )


def proof_samples(
    folder: Path, given: str, count: int, *, data: DataConfig | None = None, places: Places | None = None
) -> list[Trial]:
    """Return the first `count` samples of shards or rows; without a path, samples drawn here.

    `data` says how images, videos and conversations were prepared in training, `places` where media may be.
    """
    if not given:
        return trials(folder)
    if is_rows(given):
        shards = shards_of_rows(RowSource(path=Path(given)), "--verify", cache_dir=None, jobs=1, places=places)
    else:
        shards = find_shards(given, "--verify")
    reader = SampleReader(places=places)
    data = data or DataConfig()
    renderer = Renderer(folder, image=data.image, video=data.video, chat=data.chat)
    samples: list[Trial] = []
    for shard in shards:
        for number, key in enumerate(reader.index(shard).keys):
            if len(samples) == count:
                return samples
            record, members = reader.sample(shard, number)
            sample = renderer.build(record, *reader.media(record, members, shard.parent), key=key)
            samples.append(Trial(name=key, record=record, sample=sample))
    if not samples:
        raise ValueError(f"--verify {given} contains no sample; give shards or rows with at least one")
    return samples


def _apart(plan: MergePlan, samples: TrialSet, device: torch.device) -> Outcome:
    """Run the base with a separate adapter: experts by their factors, matrices by hooks; routers and head merged."""
    base, source = plan.base, plan.source
    stacks = {name: change for name, change in source.changes.items() if is_expert_stack(name)}
    r = -(-max((change.r for change in stacks.values()), default=0) // _GEMM_ROWS) * _GEMM_ROWS
    layer = LayerOptions(experts="lora", lora=ExpertLora(r=r, alpha=r)) if stacks else LayerOptions()
    empty = build(base.folder, ModelOptions(dtype=torch.float32, layer=layer, context=plan.context))
    hooked = _hook_matrices(empty, source, device)

    def read(name: str) -> Tensor:
        if ".lora_" in name:
            return _factor(name, base, stacks, r)
        if name in source.full:
            return source.read_full(name)
        tensor = base.read(name)
        if name in source.changes and name not in hooked and name not in stacks:
            a, b = source.changes[name].read()
            return tensor.float() + source.changes[name].scale * (b[0].float() @ a[0].float())
        return tensor

    return run_packed(empty, read, samples, base, device, torch.float32)


def _hook_matrices(empty: EmptyModel, source: AdapterSource, device: torch.device) -> set[str]:
    """Let each adapted linear layer add its low-rank part to its output; return the names of their weights."""
    hooked = set()
    for name, module in empty.module.named_modules():
        change = source.changes.get(f"{name}.weight")
        if change is None or not isinstance(module, nn.Linear) or f"{name}.weight" == HEAD:
            continue

        def add(_module: nn.Module, inputs: Any, output: Tensor, change: Change = change) -> Tensor:
            a, b = (factor[0].to(device=device, dtype=output.dtype) for factor in change.read())
            return output + change.scale * F.linear(F.linear(inputs[0], a), b)

        module.register_forward_hook(add)
        hooked.add(f"{name}.weight")
    return hooked


def _factor(name: str, base: BaseFiles, stacks: dict[str, Change], r: int) -> Tensor:
    """Return a factor of all experts in the layer's own form: padded to one rank, with the scale in B."""
    module, _, kind = name.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".")
    stack = packed_stack(module)
    experts, out, into = base.shapes[stack]
    factor = torch.zeros((experts, r, into) if kind == "lora_A" else (experts, out, r))
    if stack in stacks:
        a, b = stacks[stack].read()
        if kind == "lora_A":
            factor[:, : a.shape[1]] = a
        else:
            factor[:, :, : b.shape[2]] = b.float() * stacks[stack].scale
    return factor
