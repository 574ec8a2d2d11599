"""The part of the deep_ep package that DeepSpeed calls, on gloo: it moves the same data, without the speed.

DeepEP needs CUDA and a fabric, so these tests never run the real package: they show that our layer uses the interface
that DeepSpeed's transport expects. Rows arrive sorted by expert and, within one expert, from the last source first.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

topk_idx_t = torch.int64


@dataclass
class Handle:
    """The layout of one dispatch's rows, for the combine and for both backward passes."""

    topk_idx: Tensor
    slots: Tensor
    send: list[int]
    receive: list[int]
    order: Tensor
    psum_num_recv_tokens_per_expert: Tensor
    num_expanded_tokens: int
    do_expand: bool = True


class ElasticBuffer:
    """One communication context for a group."""

    def __init__(self, group: Any, **sizes: Any) -> None:
        self.group, self.sizes, self.calls = group, sizes, 0

    def dispatch(
        self,
        tokens: Tensor,
        *,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        handle: Handle | None = None,
        num_experts: int = 0,
        do_expand: bool,
        expert_alignment: int = 1,
        num_sms: int,
    ) -> tuple[Tensor, None, Tensor | None, Handle, None]:
        self.calls += 1
        assert do_expand
        if handle is None:
            assert topk_idx is not None
            handle = self._handle(topk_idx, num_experts)
        rows = tokens[handle.slots // handle.topk_idx.shape[1]]
        weights = None if topk_weights is None else self._there(topk_weights.flatten()[handle.slots][:, None], handle)
        return self._there(rows, handle), None, None if weights is None else weights[:, 0], handle, None

    def combine(
        self, rows: Tensor, *, handle: Handle, topk_weights: Tensor | None = None, num_sms: int
    ) -> tuple[Tensor, Tensor | None, None]:
        self.calls += 1
        tokens, top_k = handle.topk_idx.shape
        home = torch.zeros(tokens, rows.shape[1]).index_add_(0, handle.slots // top_k, self._back(rows, handle).float())
        weights = None
        if topk_weights is not None:
            flat = torch.zeros(tokens * top_k)
            flat[handle.slots] = self._back(topk_weights.reshape(-1, 1).float(), handle)[:, 0]
            weights = flat.view(tokens, top_k)
        return home.to(rows.dtype), weights, None

    def destroy(self) -> None:
        self.calls = -1

    def _handle(self, topk_idx: Tensor, num_experts: int) -> Handle:
        size = dist.get_world_size(self.group)
        local = num_experts // size
        experts, slots = topk_idx.flatten().sort(stable=True)
        send = torch.bincount(experts // local, minlength=size)
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send, group=self.group)
        arrived = torch.empty(int(receive.sum()), dtype=experts.dtype)
        dist.all_to_all_single(arrived, experts, receive.tolist(), send.tolist(), group=self.group)
        order = len(arrived) - 1 - arrived.flip(0).argsort(stable=True)
        psum = torch.bincount(arrived % local, minlength=local).cumsum(0)
        return Handle(topk_idx, slots, send.tolist(), receive.tolist(), order, psum, len(arrived))

    def _there(self, rows: Tensor, handle: Handle) -> Tensor:
        out = rows.new_empty(sum(handle.receive), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), handle.receive, handle.send, group=self.group)
        return out[handle.order]

    def _back(self, rows: Tensor, handle: Handle) -> Tensor:
        unsorted = torch.empty_like(rows).index_copy_(0, handle.order, rows)
        out = rows.new_empty(sum(handle.send), rows.shape[1])
        dist.all_to_all_single(out, unsorted, handle.send, handle.receive, group=self.group)
        return out
