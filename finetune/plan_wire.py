"""Bytes that one rank sends in a step, by kind and by the link they cross. Loads no torch.

Bytes are the larger side of each operation on a rank, as an all-gather yields them and an all-to-all sends them, with
the part that stays: so they are counted in tests. What crosses a link is less, and `Traffic.seconds` says how.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from finetune.config import RunConfig
from finetune.families import Family
from finetune.gpus import Cluster
from finetune.plan_memory import DECODER, Layout, gathered, micro_batch, small
from finetune.trained import Tensor, frozen_tensors, trained_tensors

FLOAT32, INT64 = 4, 8
LINK_SHARE = 0.8
"""Of a link's data-sheet rate, what collectives reach."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One kind of traffic of one rank in a step."""

    kind: str
    bytes: int
    group: int
    """Ranks that take part."""
    link: str
    """node: inside a node; network: between nodes."""
    strided: bool = False
    """A group with one member a node: each has its own network card."""
    exchange: bool = False
    """An all-to-all, of which only a share leaves the rank, and the node."""

    def seconds(self, cluster: Cluster) -> float:
        """Time on the slowest link of the way, when nothing else uses it."""
        gpu, leaves = cluster.gpu, 1 - 1 / self.group
        if self.group == 1:
            return 0.0
        if self.link == "node":
            return self.bytes * leaves / (LINK_SHARE * gpu.link_rate)
        if self.exchange:
            abroad = 1 - min(cluster.per_node, self.group) / self.group
            return self.bytes * abroad / (LINK_SHARE * gpu.network_rate)
        # a ring through all ranks of a node uses all its network cards at once
        rate = gpu.network_rate if self.strided else min(gpu.link_rate, gpu.network_rate * cluster.per_node)
        return self.bytes * leaves / (LINK_SHARE * rate)


def traffic(config: RunConfig, base: Family, layout: Layout, cluster: Cluster, *, micro_batches: int) -> list[Traffic]:
    """Everything that travels in one step but a few hundred bytes of sums."""
    trained = trained_tensors(base, config.adapters, ep=layout.ep)
    frozen = () if layout.resident else frozen_tensors(base, config.adapters, ep=layout.ep)
    found = [
        *_exchanges(config, base, layout, cluster, micro_batches),
        *_gathers(trained, frozen, layout, cluster, micro_batches),
        *_gradients(trained, layout, cluster, micro_batches),
    ]
    return [one for one in found if one.bytes and one.group > 1]


def _exchanges(config: RunConfig, base: Family, layout: Layout, cluster: Cluster, micro_batches: int) -> list[Traffic]:
    """Rows to their experts and back: in forward, in backward, and again where a layer is recomputed whole."""
    rows, layers = micro_batch(config, base, layout), len(base.moe_layers)
    link = "node" if layout.ep <= cluster.per_node else "network"
    found = []
    if base.text.experts is not None and layout.ep > 1:
        passes = 6 if layout.recompute == "layer" else 4
        if rows.tiles > 1:  # a tile is exchanged once more in backward, within a recomputed layer too
            passes = 6 if layout.recompute == "none" else 8
        payload = rows.tokens * base.text.experts.num_experts_per_tok * base.text.hidden_size * layout.itemsize
        size = micro_batches * layers * passes * payload
        found.append(Traffic(kind="expert rows", bytes=size, group=layout.ep, link=link, exchange=True))
        counts = micro_batches * layers * base.text.experts.num_experts * INT64
        found.append(Traffic(kind="expert counts", bytes=counts, group=layout.ep, link=link, exchange=True))
    if layout.sp > 1:
        text = base.text
        copies = layout.sp // gcd(text.num_key_value_heads, layout.sp)
        width = 2 * (text.num_attention_heads + text.num_key_value_heads * copies) * text.head_dim
        passes = 2 if layout.recompute == "none" else 3
        size = micro_batches * text.num_hidden_layers * passes * rows.tokens * width * layout.itemsize
        link = "node" if layout.sp <= cluster.per_node else "network"
        found.append(Traffic(kind="sequence slices", bytes=size, group=layout.sp, link=link, exchange=True))
    return found


def _gathers(
    trained: Sequence[Tensor], frozen: Sequence[Tensor], layout: Layout, cluster: Cluster, micro_batches: int
) -> list[Traffic]:
    """Small tensors once a step, after the update; larger ones in every micro-batch, as often as they are let go."""
    reach = sum(tensor.elements for tensor in gathered([*trained, *frozen], layout) if tensor.part in DECODER)
    again = max(0.0, 1 - layout.reuse / 2 / reach) if reach else 0.0
    found = []
    for what, tensors in (("trained", trained), ("frozen", frozen)):
        for expert in (False, True):
            mine = [tensor for tensor in tensors if tensor.expert == expert]
            wide = sum(tensor.elements * _passes(tensor, layout, again) for tensor in gathered(mine, layout))
            size = int(layout.itemsize * (small(mine, layout) + micro_batches * wide))
            found.append(_over(f"{what} weights{', experts' if expert else ''}", size, expert, layout, cluster))
    return found


def _passes(tensor: Tensor, layout: Layout, again: float) -> float:
    """How often a large tensor is brought together in a micro-batch.

    Once in forward. `again` is the share of the decoder that forward's end has let go of when backward comes to it: the
    engine keeps what is used again soon. Beside the frozen stacks that share is fetched once more after a layer was
    recomputed. Tower and head are done when the forward is; so is the embedding, unless layers are recomputed.
    """
    if tensor.part == "embed_tokens":
        return 1 if layout.recompute == "none" else 2
    if tensor.part not in DECODER:
        return 1
    return 1 + again * (1 if layout.recompute == "none" or (tensor.expert and not tensor.trained) else 2)


def _gradients(trained: Sequence[Tensor], layout: Layout, cluster: Cluster, micro_batches: int) -> list[Traffic]:
    """Reduced to slices, in float32, after every micro-batch."""
    found = []
    for expert in (False, True):
        elements = sum(tensor.elements for tensor in trained if tensor.expert == expert)
        size = FLOAT32 * micro_batches * elements
        found.append(_over(f"gradients{', experts' if expert else ''}", size, expert, layout, cluster))
    return found


def _over(kind: str, size: int, expert: bool, layout: Layout, cluster: Cluster) -> Traffic:
    """Over all ranks, or over the ranks that hold the same experts, which lie ep ranks apart."""
    group = layout.replicas if expert else layout.world
    inside = layout.world <= cluster.per_node
    strided = expert and layout.ep >= cluster.per_node
    return Traffic(kind=kind, bytes=size, group=group, link="node" if inside else "network", strided=strided)
