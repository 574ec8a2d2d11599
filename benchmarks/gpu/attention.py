"""Compare each attention implementation of this device on packed rows with float32 on single samples."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from math import inf

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.device import synchronise
from benchmarks.gpu.sizes import Sizes
from benchmarks.harness.figure import Figure, Peer, at_most
from benchmarks.harness.measure import Side, take_turns
from benchmarks.harness.outputs import same_tensors
from finetune.model.varlen import segments, varlen

RELATIVE = 2e-2
"""Allowed error relative to each tensor's largest value: bfloat16 has eight bits."""
Attend = Callable[..., tuple[Tensor, None]]


def run(sizes: Sizes) -> Iterator[Figure]:
    """Yield the error of each implementation, and the time of `varlen` compared with `segments`."""
    ways: dict[str, Attend] = {"segments": segments}
    if sizes.device == "cuda":
        ways["varlen"] = varlen
    for lengths in sizes.samples:
        row = _Row(sizes, lengths)
        reference = row.reference()
        for name, attend in ways.items():
            errors = same_tensors(row.step(attend), reference, relative=inf)  # the figure has the limit
            yield Figure(
                f"{name}, {row.words}: largest error",
                max(errors.values()),
                "of the largest value",
                config=row.config | {"errors": errors},
                target=at_most(RELATIVE),
            )
        sides = [Side(name=name, run=partial(row.step, attend)) for name, attend in ways.items()]
        times = [min(t) for t in take_turns(sides, rounds=2 * sizes.rounds, synchronise=synchronise)]
        yield Figure(
            f"{sides[-1].name}, {row.words}: forward and backward",
            1e3 * times[-1],
            "ms",
            config=row.config,
            n=2 * sizes.rounds,
            peer=Peer("segments", 1e3 * times[0]) if len(times) > 1 else None,
        )


class _Row:
    """Queries, keys, values and a gradient of a packed row, in the form that transformers passes."""

    def __init__(self, sizes: Sizes, lengths: tuple[int, ...]) -> None:
        heads, kv, size = sizes.heads
        self.lengths, self.copies = lengths, heads // kv
        tokens = sum(lengths)
        self.words = f"{len(lengths)} samples of {tokens} tokens"
        self.config = {
            "heads": heads,
            "kv_heads": kv,
            "head_dim": size,
            "dtype": "bfloat16",
            "lengths": lengths if len(lengths) < 9 else f"{len(lengths)} from {min(lengths)} to {max(lengths)}",
        }
        generator = torch.Generator().manual_seed(tokens)
        shapes = [(1, n, tokens, size) for n in (heads, kv, kv)] + [(1, tokens, heads, size)]
        drawn = [torch.randn(shape, generator=generator).to(sizes.device, torch.bfloat16) for shape in shapes]
        self.qkv, self.grad = [x.requires_grad_() for x in drawn[:3]], drawn[3]
        cuts = torch.tensor([0, *lengths]).cumsum(0)
        self.cuts = cuts.to(sizes.device, torch.int32)
        self.module = nn.Module()

    def step(self, attend: Attend) -> dict[str, Tensor]:
        """Run forward and backward with one implementation."""
        for x in self.qkv:
            x.grad = None
        longest = max(self.lengths)
        borders = {"cu_seq_lens_q": self.cuts, "cu_seq_lens_k": self.cuts}
        out, _ = attend(self.module, *self.qkv, **borders, max_length_q=longest, max_length_k=longest)
        torch.autograd.backward(out, self.grad)
        return self._results(out, self.qkv)

    def reference(self) -> dict[str, Tensor]:
        """Compute the same in float32, sample by sample, with a separate key for each query head."""
        q, k, v = qkv = [x.detach().float().requires_grad_() for x in self.qkv]
        k, v = (x.repeat_interleave(self.copies, dim=1) for x in (k, v))
        cuts = self.cuts.tolist()
        parts = [[x[:, :, first:last] for x in (q, k, v)] for first, last in pairwise(cuts)]
        outs = [scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in parts]
        out = torch.cat(outs, dim=2).transpose(1, 2)
        torch.autograd.backward(out, self.grad.float())
        return self._results(out, qkv)

    def _results(self, out: Tensor, qkv: list[Tensor]) -> dict[str, Tensor]:
        gradients = [x.grad for x in qkv]
        assert all(gradient is not None for gradient in gradients)
        return {
            "out": out.detach(),
            **{f"d{n}": g.clone() for n, g in zip("qkv", gradients, strict=True) if g is not None},
        }
