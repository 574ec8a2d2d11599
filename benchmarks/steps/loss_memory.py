"""`loss-memory`: memory of head and loss at the real vocabulary, compared with transformers' full logits."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks.harness.figure import Figure, Peer, at_most, ratio_at_least
from benchmarks.harness.memory import Allocations
from benchmarks.harness.outputs import same_tensors
from benchmarks.harness.rows import text_row
from data.stream.batch import Batch
from finetune.model.loss import row_losses, tile_head
from finetune.model.row import lay_out

VOCAB = 151_936
HIDDEN = 128
TOKENS = 2048
SUPERVISED = (128, 512, 1024, 2047)
PEER = "transformers, full logits"
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Case:
    """A case of last hidden states, which always need gradients, and a head, which trains if `trained`."""

    dtype: torch.dtype
    trained: bool
    supervised: int

    @property
    def name(self) -> str:
        """The name for the record."""
        head = "trained" if self.trained else "frozen"
        return f"{str(self.dtype).removeprefix('torch.')}, {head} head, {self.supervised} of {TOKENS} supervised"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of one side, and the bytes it needed beyond its inputs."""

    tensors: dict[str, Tensor]
    peak: int
    saved: int
    """Bytes kept for backward once the loss is computed."""


class _Headed(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=case.dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.lm_head.weight.copy_(torch.randn(VOCAB, HIDDEN, generator=generator) * HIDDEN**-0.5)
        self.lm_head.requires_grad_(case.trained)


def run() -> Iterator[Figure]:
    """Yield peaks by data type and head, and the cost of an additional supervised token."""
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for trained in (False, True):
            yield _peak(Case(dtype=dtype, trained=trained, supervised=SUPERVISED[-1]))[0]
    by_number = [_peak(Case(dtype=torch.float32, trained=False, supervised=number)) for number in SUPERVISED]
    yield from (figure for figure, _ in by_number[:-1])
    saved = dict(zip(SUPERVISED, (ours.saved for _, ours in by_number), strict=True))
    yield Figure(
        "kept for backward by one more supervised token",
        max((saved[more] - saved[few]) / (more - few) for few, more in pairwise(SUPERVISED)),
        "bytes",
        config={"vocabulary": VOCAB, "hidden": HIDDEN, "kept_bytes": saved},
        # the token's own gradient in float32, and its loss
        target=at_most(4 * HIDDEN + 64),
    )


def _peak(case: Case) -> tuple[Figure, Outcome]:
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    batch = _row(case.supervised)
    ours, peer = _ours(case, hidden, batch), _peer(case, hidden, batch)
    # bfloat16 rounds each logit and each product, and the sides round at different places
    same_tensors(ours.tensors, peer.tensors, relative=1e-5 if case.dtype == torch.float32 else 2e-2)
    figure = Figure(
        f"peak, {case.name}",
        ours.peak / MIB,
        "MiB",
        config={"vocabulary": VOCAB, "hidden": HIDDEN, "tokens": TOKENS, "case": case.name},
        peer=Peer(PEER, peer.peak / MIB),
        target=ratio_at_least(8.0),
    )
    return figure, ours


def _ours(case: Case, hidden: Tensor, batch: Batch) -> Outcome:
    model, hidden = _Headed(case), hidden.clone().requires_grad_()
    row = lay_out(batch)
    tile_head(model)
    total = float(batch.loss_weights.sum())
    with Allocations() as seen:
        loss = row_losses(model.lm_head, hidden, row, "token").objective / total
        saved = seen.live_bytes
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return _outcome(model, hidden, loss, seen, saved)


def _peer(case: Case, hidden: Tensor, batch: Batch) -> Outcome:
    model, hidden = _Headed(case), hidden.clone().requires_grad_()
    labels = batch.input_ids.masked_fill(batch.loss_weights == 0, -100)
    with Allocations() as seen:
        loss = ForCausalLMLoss(model.lm_head(hidden[None]), labels, vocab_size=VOCAB)
        saved = seen.live_bytes
        loss.backward()
    return _outcome(model, hidden, loss, seen, saved)


def _outcome(model: _Headed, hidden: Tensor, loss: Tensor, seen: Allocations, saved: int) -> Outcome:
    tensors = {"loss": loss.detach(), "hidden": hidden.grad, "head": model.lm_head.weight.grad}
    return Outcome(tensors={k: t for k, t in tensors.items() if t is not None}, peak=seen.peak_bytes, saved=saved)


def _row(supervised: int) -> Batch:
    """Build a row of one sample whose last tokens are supervised."""
    ids = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(2))
    return text_row([ids], [torch.arange(TOKENS) >= TOKENS - supervised])
