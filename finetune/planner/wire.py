"""Bytes that one rank sends per step, by kind and by the link that they cross. Loads no torch.

The bytes of an operation are those of its larger side on a rank: the output of an all-gather, the input of an
all-to-all, with the part that stays on the rank. Tests count them in the same way. Fewer bytes cross a link;
`Traffic.seconds` computes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from finetune.architecture.families import Family
from finetune.architecture.parts import DECODER
from finetune.architecture.trained import Tensor, frozen_tensors, trained_tensors
from finetune.config import RunConfig
from finetune.planner.activations import INDEX, WIDE, Reach
from finetune.planner.gpus import Cluster
from finetune.planner.moments import micro_batch
from finetune.planner.rank_layout import RankLayout, gathered, size, small_bytes

LINK_SHARE = 0.8
"""Share of a link's data-sheet rate that collectives reach."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One kind of traffic of one rank per step."""

    kind: str
    bytes: int
    group: int
    """Ranks that take part."""
    link: str
    """`node`: inside a node; `network`: between nodes."""
    strided: bool = False
    """A group with one rank per node, so that each has its own network card."""
    exchange: bool = False
    """An all-to-all: only a share of the bytes leaves the rank, and the node."""

    @property
    def leaving(self) -> int:
        """Return the bytes of an exchange that leave the rank if the rows are spread evenly."""
        return self.bytes - self.bytes // self.group

    def seconds(self, cluster: Cluster) -> float:
        """Return the time on the slowest link of the path, if nothing else uses it."""
        if self.group == 1:
            return 0.0
        gpu, leaving = cluster.gpu, 1 - 1 / self.group
        if self.link == "node":
            return self.bytes * leaving / (LINK_SHARE * gpu.link_rate)
        if self.exchange:
            to_other_nodes = 1 - min(cluster.per_node, self.group) / self.group
            return self.bytes * to_other_nodes / (LINK_SHARE * gpu.network_rate)
        # a ring through all ranks of a node uses all its network cards at once
        rate = gpu.network_rate if self.strided else min(gpu.link_rate, gpu.network_rate * cluster.per_node)
        return self.bytes * leaving / (LINK_SHARE * rate)


def traffic(
    config: RunConfig, base: Family, layout: RankLayout, cluster: Cluster, *, micro_batches: int
) -> list[Traffic]:
    """Return all traffic of one step, except a few hundred bytes of sums."""
    trained = trained_tensors(base, config.adapters, ep=layout.ep)
    frozen = (
        () if layout.resident else frozen_tensors(base, config.adapters, ep=layout.ep, quantise=config.model.quantise)
    )
    every = [
        *_expert_exchanges(config, base, layout, cluster, micro_batches),
        *_slice_exchanges(config, base, layout, cluster, micro_batches),
        *_gathers(trained, frozen, layout, cluster, micro_batches, Reach.of(config.adapters)),
        *_gradients(trained, layout, cluster, micro_batches),
    ]
    return [kind for kind in every if kind.bytes and kind.group > 1]


def _expert_exchanges(
    config: RunConfig, base: Family, layout: RankLayout, cluster: Cluster, micro_batches: int
) -> list[Traffic]:
    """Return the traffic of rows to their experts and back, and of the counts sent before them."""
    experts, reach = base.text.experts, Reach.of(config.adapters)
    if experts is None or layout.ep == 1:
        return []
    rows = micro_batch(config, base, layout)
    link = "node" if layout.ep <= cluster.per_node else "network"
    even = rows.tokens * experts.num_experts_per_tok
    size = sum(
        exchanged(base, layout, out=even, back=even, tiles=rows.tiles, reach=reach, first=number == 0)
        for number in base.moe_layers
    )
    calls = len(base.moe_layers) * rows.tiles
    if rows.tiles > 1 and layout.recompute != "none":  # of a recomputed layer, all tiles but the last repeat it
        calls += len(base.moe_layers) * (rows.tiles - 1)
    counts = calls * experts.num_experts * INDEX
    return [
        _exchange("expert rows", micro_batches * size, layout.ep, link),
        _exchange("expert counts", micro_batches * counts, layout.ep, link),
    ]


def _slice_exchanges(
    config: RunConfig, base: Family, layout: RankLayout, cluster: Cluster, micro_batches: int
) -> list[Traffic]:
    """Return the exchange of tokens for heads and back, and of the tower's features to the slices of the row."""
    if layout.sp == 1:
        return []
    rows, reach = micro_batch(config, base, layout), Reach.of(config.adapters)
    text, vision = base.text, base.vision
    link = "node" if layout.sp <= cluster.per_node else "network"
    copies = layout.sp // gcd(text.num_key_value_heads, layout.sp)
    width = 2 * (text.num_attention_heads + text.num_key_value_heads * copies) * text.head_dim
    again = reach.layers and layout.recompute != "none"
    passes = text.num_hidden_layers * (1 + again + reach.layers) - (reach.layers and not reach.first)
    slices = passes * rows.tokens * width * layout.itemsize
    tokens = rows.patches // vision.spatial_merge_size**2
    levels = 1 + len(vision.deepstack_visual_indexes)
    features = (1 + reach.vision) * tokens * levels * text.hidden_size * layout.itemsize
    return [
        _exchange("sequence slices", micro_batches * slices, layout.sp, link),
        _exchange("vision features", micro_batches * features, layout.sp, link),
    ]


def _exchange(kind: str, size: int, group: int, link: str) -> Traffic:
    return Traffic(kind=kind, bytes=size, group=group, link=link, exchange=True)


def exchanged(
    base: Family, layout: RankLayout, *, out: int, back: int, tiles: int = 1, reach: Reach, first: bool = False
) -> int:
    """Return the bytes of rows that a rank sends in a layer: `out` rows of its tokens, `back` rows of its experts.

    Rows go out and come back in forward, and their gradients in backward, where the input of the `first` layer may need
    no gradient. A layer with `recompute: layer` sends both ways again; so does a tile, also in a recomputed layer.
    """
    rows = out + back
    if reach.layers:
        again = float(layout.recompute == "layer")
        if tiles > 1:  # the second pass of a layer ends before its last tile, of which backward needs only the input
            again = 1 + (0 if layout.recompute == "none" else (tiles - 1) / tiles)
        rows += int(again * (out + back)) + out + (back if reach.first or not first else 0)
    return rows * base.text.hidden_size * layout.itemsize


def _gathers(
    trained: Sequence[Tensor],
    frozen: Sequence[Tensor],
    layout: RankLayout,
    cluster: Cluster,
    micro_batches: int,
    reach: Reach,
) -> list[Traffic]:
    """Return the gathers: of small tensors after each update, of larger ones in each micro-batch."""
    decoder = sum(tensor.elements for tensor in gathered([*trained, *frozen], layout) if tensor.part in DECODER)
    again = max(0.0, 1 - layout.reuse / 2 / decoder) if decoder else 0.0
    gathers = []
    for word, tensors in (("trained", trained), ("frozen", frozen)):
        for expert in (False, True):
            alike = [tensor for tensor in tensors if tensor.expert == expert]
            wide = sum(
                size(tensor, layout) * tensor.elements * _passes(tensor, layout, again, reach)
                for tensor in gathered(alike, layout)
            )
            sent = int(small_bytes(alike, layout) + micro_batches * wide)
            gathers.append(_over(f"{word} weights{', experts' if expert else ''}", sent, expert, layout, cluster))
    return gathers


def _passes(tensor: Tensor, layout: RankLayout, again: float, reach: Reach) -> float:
    """Return how often a large tensor is gathered in a micro-batch.

    It is gathered once in forward. `again` is the share of the decoder that the engine has released when backward
    reaches it; the engine keeps weights that are used again soon. This share is fetched again after a layer was
    recomputed, except for the frozen stacks. Tower and head are gathered in forward only. One rule is counted, not
    derived: if layers are recomputed, frozen weights of the lowest recomputed part are gathered once more. That part is
    the tower's blocks or else the embedding.
    """
    lowest = "vision_blocks" if reach.tower else "embeddings"
    if tensor.part == lowest and layout.recompute != "none":
        return 1 if tensor.trained else 2
    if tensor.part not in DECODER:
        return 1
    return 1 + again * (1 if layout.recompute == "none" or (tensor.expert and not tensor.trained) else 2)


def _gradients(trained: Sequence[Tensor], layout: RankLayout, cluster: Cluster, micro_batches: int) -> list[Traffic]:
    """Return the gradients, reduced to slices in float32 after every micro-batch."""
    gradients = []
    for expert in (False, True):
        elements = sum(tensor.elements for tensor in trained if tensor.expert == expert)
        size = WIDE * micro_batches * elements
        gradients.append(_over(f"gradients{', experts' if expert else ''}", size, expert, layout, cluster))
    return gradients


def _over(kind: str, size: int, expert: bool, layout: RankLayout, cluster: Cluster) -> Traffic:
    """Return traffic over all ranks, or over the ranks with the same experts, which are ep ranks apart."""
    group = layout.replicas if expert else layout.world
    inside = layout.world <= cluster.per_node
    strided = expert and layout.ep >= cluster.per_node
    return Traffic(kind=kind, bytes=size, group=group, link="node" if inside else "network", strided=strided)
