"""What one micro-batch keeps and needs at once, per decoder layer, from the operations that the layer runs.

The sums follow the autograd graph of the code: what each operation saves for backward, what a recomputed layer keeps,
what backward of the experts holds beside that. A test compares them with bytes counted in real runs. Loads no torch.

Letters: T tokens of this rank, D hidden, H and KV widths of queries and keys, E experts, K top-k, R rows that arrive,
F expert hidden, r LoRA rank; b bytes of an activation.
"""

from dataclasses import dataclass
from typing import Literal, Self

from finetune.architecture.families import Family, Text
from finetune.architecture.parts import PARTS, TOWER, VISION
from finetune.config import AdaptersConfig

Recompute = Literal["none", "layer", "selective"]
CHUNK_BYTES, KEEP_BYTES = 1 << 30, 4 << 30
"""Those of the experts: intermediates at a time, and the gate_up output that a call keeps at most."""
TILE_BYTES = 160 * 2**20
"""Float32 logits that the loss makes at once."""
MOVED_BYTES = 1 << 20
"""The least of a tensor that waits in host memory."""
INDEX, WIDE = 8, 4
"""Bytes of an index and of a float32."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One micro-batch of one rank. `arriving` counts rows of experts: T x K where the load is even."""

    tokens: int
    supervised: int
    patches: int
    arriving: float
    itemsize: int
    tiles: int = 1
    """Parts in which experts take the row; they are computed again in backward."""
    segmented: bool = False
    """The CPU's attention, sample by sample, which keeps each sample's output and their concatenation."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far gradients go down: into the tower's blocks, to its output, into the first layer's experts, any layer."""

    tower: bool
    vision: bool
    first: bool
    layers: bool

    @classmethod
    def of(cls, adapters: AdaptersConfig) -> Self:
        """By what trains."""
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
    """For backward, by the whole layer."""
    returned: float
    """Of what was kept, what the second pass hands on and lets go of before backward begins."""
    shared: float = 0.0
    """Of `saved`, the layer's input, which `kept` has too."""
    kept: float
    """From the first pass to the second, where the layer is recomputed."""
    stays: float
    """Of that, what stays on the device when the rest waits in host memory: indices and small tensors."""
    exchange: float
    """Rows on their way, beside what is saved."""
    working: float
    """Gradients and products that backward holds at its highest point."""
    passing: float
    """What forward holds at its highest point where it saves nothing: its input, the state between, the normed one;
    rows of experts before and after, with gate, up and their product."""


def layer(base: Family, adapters: AdaptersConfig, rows: Rows, recompute: Recompute, *, sparse: bool, ep: int) -> Layer:
    """One decoder layer with experts (`sparse`), or with a plain MLP."""
    text, b, t = base.text, rows.itemsize, rows.tokens
    residual = float(t * text.hidden_size * b)
    attention = _attention(text, adapters, rows)
    norms = 2 * residual + 2 * t * WIDE  # what they read, and their roots
    if not sparse:
        saved = attention + norms + _mlp(text, adapters, rows)
        wide = float(t * text.intermediate_size * b)
        return Layer(saved=saved, returned=0.0, shared=residual, kept=residual, stays=_small(residual), exchange=0.0,
                     working=3 * (wide + residual), passing=2 * wide + 3 * residual)  # fmt: skip
    experts = _experts(base, adapters, rows, ep)
    choice = t * _topk(base) * INDEX
    exchange = rows.arriving * text.hidden_size * b
    passing = (2 * exchange + experts.inner) / rows.tiles + 3 * residual
    if rows.tiles > 1:  # each tile is a checkpoint: its input stays, and one tile at a time is computed again
        at_work = (experts.saved + experts.working + exchange) / rows.tiles
        saved = attention + norms + residual + t * _topk(base) * (WIDE + INDEX)
        return Layer(saved=saved, returned=0.0, shared=residual, kept=residual + choice, exchange=0.0, passing=passing,
                     stays=_small(residual) + choice, working=at_work + 2 * residual)  # fmt: skip
    kept = experts.kept if recompute == "selective" else ()
    return Layer(
        saved=attention + norms + experts.saved,
        returned=sum(kept),
        shared=residual,
        kept=residual + choice + sum(kept),
        stays=_small(residual, *kept) + choice,
        exchange=exchange,
        working=experts.working + 2 * residual,
        passing=passing,
    )


def _small(*tensors: float) -> float:
    """Bytes of those too small to be worth the way to the host."""
    return sum(size for size in tensors if size < MOVED_BYTES)


def _attention(text: Text, adapters: AdaptersConfig, rows: Rows) -> float:
    """Queries and keys before their norms and rotated, values, output, log sums."""
    heads, kv = text.num_attention_heads, text.num_key_value_heads
    wide, narrow = heads * text.head_dim, kv * text.head_dim
    b, family = rows.itemsize, adapters.attention
    token = (wide + narrow) * b + (heads + kv) * WIDE  # what the norms read, and their roots
    token += (wide + 2 * narrow) * b + wide * b + heads * WIDE  # what the kernel reads and makes
    if family.mode != "frozen":
        token += text.hidden_size * b  # what enters the projections
        token += wide * b if rows.segmented else 0
    token += 4 * family.r * b if family.mode == "lora" else 0
    return rows.tokens * token


def _mlp(text: Text, adapters: AdaptersConfig, rows: Rows) -> float:
    b, family, inner = rows.itemsize, adapters.mlp, text.intermediate_size
    token = 3 * inner * b  # gate before and after the activation, and up
    if family.mode != "frozen":
        token += (inner + text.hidden_size) * b
    token += 3 * family.r * b if family.mode == "lora" else 0
    return rows.tokens * token


@dataclass(frozen=True, kw_only=True)
class _Experts:
    saved: float
    kept: tuple[float, ...]
    working: float
    inner: float


def _topk(base: Family) -> int:
    return base.text.experts.num_experts_per_tok if base.text.experts is not None else 0


def _experts(base: Family, adapters: AdaptersConfig, rows: Rows, ep: int) -> _Experts:
    experts, d = base.text.experts, base.text.hidden_size
    assert experts is not None
    inner, k, b, arriving = experts.moe_intermediate_size, experts.num_experts_per_tok, rows.itemsize, rows.arriving
    family, router = adapters.experts, adapters.router
    r = family.r if family.mode == "lora" else 0
    keeps = arriving * 2 * inner * b <= KEEP_BYTES
    token = experts.num_experts * WIDE + k * (2 * WIDE + b + 3 * INDEX) + k * d * b  # scores, orders, outputs
    token += d * b if router.mode != "frozen" else 0
    token += router.r * b if router.mode == "lora" else 0
    row = (2 * INDEX if ep > 1 else 0) + (2 * inner * b if keeps else 0) + 2 * r * b
    row += d * b if family.mode != "frozen" or not keeps else 0
    gate_up = (2 * inner + r) * b if keeps else 0
    kept = (arriving * gate_up, arriving * d * b if ep > 1 else 0.0, float(rows.tokens * k * d * b))
    chunk = max(8, CHUNK_BYTES // ((6 * inner + 2 * d) * b) // 8 * 8)
    at_once = min(arriving, chunk)
    # the outputs are gone by then: either their gradients change place, or the widest gradients of the experts exist
    moving = (arriving - rows.tokens * k) * d * b
    inside = at_once * (5 * inner + r) * b - rows.tokens * k * d * b
    saved, middle = rows.tokens * token + arriving * row, at_once * 3 * inner * b
    return _Experts(saved=saved, kept=kept, working=max(moving, inside), inner=middle)


def head(base: Family, rows: Rows, *, trained: bool) -> float:
    """The head with its loss: the last norm, the supervised rows with their gradients, and one tile of logits."""
    text = base.text
    tile = min(max(1, TILE_BYTES // (WIDE * text.vocab_size)), rows.supervised)
    narrow = 0 if rows.itemsize == WIDE else rows.itemsize
    tiles = tile * text.vocab_size * (WIDE + narrow)
    last = 2 * rows.tokens * text.hidden_size * rows.itemsize
    gradients = text.vocab_size * text.hidden_size * (WIDE + rows.itemsize) if trained else 0
    return tiles + last + 2 * rows.supervised * text.hidden_size * rows.itemsize + gradients


def row(rows: Rows, *, values: int) -> float:
    """The row itself: ids, four positions, weights and owners of its tokens, and the bytes of its patches."""
    return rows.tokens * (5 * INDEX + 2 * WIDE) + rows.patches * values


def embedded(base: Family, rows: Rows) -> float:
    """What lives from the embedding to the end of backward: the embedded row, and its rotary tables."""
    return rows.tokens * (base.text.hidden_size + 2 * base.text.head_dim) * rows.itemsize
