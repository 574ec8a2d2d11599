"""Counts the activation bytes of one micro-batch, per decoder layer, from the operations that the layer runs.

The sums follow the autograd graph of the code: the tensors that each operation saves for backward, those that a
recomputed layer keeps, and those that backward of the experts also holds. A test compares them with bytes counted in
real runs. Loads no torch.

`itemsize` is the bytes per element of an activation; sums named `token` or `row` are bytes of one token or of one row
of experts.
"""

from dataclasses import dataclass
from typing import Literal, Self

from finetune.architecture.families import Experts, Family, Text
from finetune.architecture.parts import PARTS, TOWER, VISION
from finetune.config import LOSS_TILE_BYTES, AdaptersConfig
from moe.config import CHUNK_BYTES, KEEP_BYTES, LEAST_HOST_BYTES

Recompute = Literal["none", "layer", "selective"]
INDEX = 8
"""Bytes of an index."""
WIDE = 4
"""Bytes of a float32."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One micro-batch of one rank. `arriving` counts rows of experts: tokens x top-k if the load is even."""

    tokens: int
    supervised: int
    patches: int
    arriving: float
    itemsize: int
    tiles: int = 1
    """Parts into which the row is cut for the experts; each part is recomputed in backward."""
    segmented: bool = False
    """Whether attention runs sample by sample, as on a CPU; it keeps each sample's output and their concatenation."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The places that gradients reach: the tower's blocks, its output, the first layer's experts, any decoder layer."""

    tower: bool
    vision: bool
    first: bool
    layers: bool

    @classmethod
    def of(cls, adapters: AdaptersConfig) -> Self:
        """Return the reach of gradients, given the parts that train."""
        trains = {part for part in PARTS if getattr(adapters, part).mode != "frozen"}
        tower = bool(trains & set(TOWER))
        vision = bool(trains & set(VISION))
        first = vision or bool(trains & {"embeddings", "attention", "norms"})
        layers = first or bool(trains & {"experts", "router", "mlp"})
        return cls(tower=tower, vision=vision, first=first, layers=layers)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Bytes of one decoder layer."""

    saved: float
    """Saved by the layer for backward."""
    kept: float
    """Kept from the first forward pass to the second, if the layer is recomputed."""
    stays: float
    """The part of `kept` that stays on the device when the rest is held in host memory: indices and small tensors."""
    returned: float = 0.0
    """The part of `kept` that the second pass uses and releases before backward begins."""
    shared: float = 0.0
    """The part of `saved` that `kept` also contains: the layer's input."""
    exchange: float = 0.0
    """Rows in transit between ranks, in addition to `saved`."""
    working: float
    """Gradients and products that backward holds at its peak."""
    passing: float
    """Tensors that forward holds at its peak when it saves nothing: its input, the state after attention, and its norm;
    the experts' rows before and after, with gate, up and their product."""


def layer(base: Family, adapters: AdaptersConfig, rows: Rows, recompute: Recompute, *, sparse: bool, ep: int) -> Layer:
    """Return the bytes of one decoder layer with experts (`sparse`), or with a plain MLP."""
    text = base.text
    residual = float(rows.tokens * text.hidden_size * rows.itemsize)
    norms = 2 * residual + 2 * rows.tokens * WIDE  # the inputs of both norms, and their inverse roots
    saved = _attention(text, adapters, rows) + norms
    if not sparse:
        wide = float(rows.tokens * text.intermediate_size * rows.itemsize)
        return Layer(
            saved=saved + _mlp(text, adapters, rows),
            kept=residual,
            stays=_small(residual),
            shared=residual,
            working=3 * (wide + residual),
            passing=2 * wide + 3 * residual,
        )
    assert text.experts is not None
    experts = _experts(text, adapters, rows, ep)
    choice = rows.tokens * text.experts.num_experts_per_tok * INDEX
    exchange = rows.arriving * text.hidden_size * rows.itemsize
    passing = (2 * exchange + experts.inner) / rows.tiles + 3 * residual
    if rows.tiles > 1:  # each tile is a checkpoint: its input stays, and one tile at a time is recomputed
        weights = rows.tokens * text.experts.num_experts_per_tok * (WIDE + INDEX)
        at_work = (experts.saved + experts.working + exchange) / rows.tiles
        return Layer(
            saved=saved + residual + weights,
            kept=residual + choice,
            stays=_small(residual) + choice,
            shared=residual,
            working=at_work + 2 * residual,
            passing=passing,
        )
    kept = experts.kept if recompute == "selective" else ()
    return Layer(
        saved=saved + experts.saved,
        kept=residual + choice + sum(kept),
        stays=_small(residual, *kept) + choice,
        returned=sum(kept),
        shared=residual,
        exchange=exchange,
        working=experts.working + 2 * residual,
        passing=passing,
    )


def _small(*tensors: float) -> float:
    """Return the bytes of tensors that are too small to be worth moving to the host."""
    return sum(size for size in tensors if size < LEAST_HOST_BYTES)


def _attention(text: Text, adapters: AdaptersConfig, rows: Rows) -> float:
    """Return the bytes that attention saves: q and k before norms and after rotation, v, output, log sums."""
    itemsize, section = rows.itemsize, adapters.attention
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    queries, keys = heads * text.head_dim, kv_heads * text.head_dim
    token = (queries + keys) * itemsize + (heads + kv_heads) * WIDE  # the inputs of the norms, and their inverse roots
    token += (queries + 2 * keys) * itemsize + queries * itemsize + heads * WIDE  # the inputs and outputs of the kernel
    if section.mode != "frozen":
        token += text.hidden_size * itemsize  # the input of the projections
        token += queries * itemsize if rows.segmented else 0
    token += 4 * section.r * itemsize if section.mode == "lora" else 0
    return rows.tokens * token


def _mlp(text: Text, adapters: AdaptersConfig, rows: Rows) -> float:
    inner, section = text.intermediate_size, adapters.mlp
    token = 3 * inner * rows.itemsize  # gate before and after the activation, and up
    if section.mode != "frozen":
        token += (inner + text.hidden_size) * rows.itemsize
    token += 3 * section.r * rows.itemsize if section.mode == "lora" else 0
    return rows.tokens * token


@dataclass(frozen=True, kw_only=True)
class _Experts:
    saved: float
    kept: tuple[float, ...]
    working: float
    inner: float


def _experts(text: Text, adapters: AdaptersConfig, rows: Rows, ep: int) -> _Experts:
    assert text.experts is not None
    inner, hidden = text.experts.moe_intermediate_size, text.hidden_size
    itemsize, arriving = rows.itemsize, rows.arriving
    sent = rows.tokens * text.experts.num_experts_per_tok
    r = adapters.experts.r if adapters.experts.mode == "lora" else 0
    keeps = arriving * 2 * inner * itemsize <= KEEP_BYTES
    row = (2 * INDEX if ep > 1 else 0) + (2 * inner * itemsize if keeps else 0) + 2 * r * itemsize
    row += hidden * itemsize if adapters.experts.mode != "frozen" or not keeps else 0
    gate_up = (2 * inner + r) * itemsize if keeps else 0
    at_once = min(arriving, chunk_rows(inner, hidden, itemsize))
    # the outputs are released by then; at the peak their gradients are permuted, or the experts' widest gradients exist
    moving = (arriving - sent) * hidden * itemsize
    inside = at_once * (5 * inner + r) * itemsize - sent * hidden * itemsize
    return _Experts(
        saved=rows.tokens * _choice(text.experts, hidden, adapters, itemsize) + arriving * row,
        kept=(arriving * gate_up, arriving * hidden * itemsize if ep > 1 else 0.0, float(sent * hidden * itemsize)),
        working=max(moving, inside),
        inner=at_once * 3 * inner * itemsize,
    )


def _choice(experts: Experts, hidden: int, adapters: AdaptersConfig, itemsize: int) -> int:
    """Return the bytes that routing saves per token: scores, sort orders, and the outputs."""
    top_k = experts.num_experts_per_tok
    token = experts.num_experts * WIDE + top_k * (2 * WIDE + itemsize + 3 * INDEX) + top_k * hidden * itemsize
    token += hidden * itemsize if adapters.router.mode != "frozen" else 0
    return token + (adapters.router.r * itemsize if adapters.router.mode == "lora" else 0)


def chunk_rows(inner: int, hidden: int, itemsize: int) -> int:
    """Return how many rows the experts take at a time; `inner` is their hidden width."""
    return max(8, CHUNK_BYTES // ((6 * inner + 2 * hidden) * itemsize) // 8 * 8)


def head(base: Family, rows: Rows, *, trained: bool) -> float:
    """Return the bytes of head and loss: the last norm, supervised rows with gradients, and one tile of logits."""
    text = base.text
    tile = min(max(1, LOSS_TILE_BYTES // (WIDE * text.vocab_size)), rows.supervised)
    narrow = 0 if rows.itemsize == WIDE else rows.itemsize
    tiles = tile * text.vocab_size * (WIDE + narrow)
    last = 2 * rows.tokens * text.hidden_size * rows.itemsize
    gradients = text.vocab_size * text.hidden_size * (WIDE + rows.itemsize) if trained else 0
    return tiles + last + 2 * rows.supervised * text.hidden_size * rows.itemsize + gradients


def row(rows: Rows, *, values: int) -> float:
    """Return the bytes of the row itself: ids, four positions, weights and owners of its tokens, and its patches."""
    return rows.tokens * (5 * INDEX + 2 * WIDE) + rows.patches * values


def embedded(base: Family, rows: Rows) -> float:
    """Return the bytes that live from the embedding to the end of backward: the embedded row and its rotary tables."""
    return rows.tokens * (base.text.hidden_size + 2 * base.text.head_dim) * rows.itemsize
