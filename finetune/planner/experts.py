"""Lists the operations of an expert block: routing, rows to their experts, the experts, and the sum. Loads no torch.

They are those that `moe/` runs; a test counts them on the meta device at ep 1. The operations on rows that come from
other ranks are taken from the code, not counted; dropout's masks are left out.
"""

from dataclasses import dataclass

from finetune.architecture.families import Family
from finetune.config import AdaptersConfig, Bits
from finetune.planner.activations import INDEX, Recompute, Rows, chunk_rows
from finetune.planner.operations import (
    SORT,
    TOP_K,
    WIDE,
    Op,
    Passes,
    cast,
    grouped,
    linear,
    linear_back,
    mm,
    outer,
    permuted,
    routing,
    touch,
    unpacked,
)
from moe.config import KEEP_BYTES


@dataclass(frozen=True, kw_only=True)
class Block:
    """The sizes and the options of one expert block on one rank."""

    t: int
    k: int
    d: int
    e: int
    arriving: float
    local: int
    f: int
    r: int
    b: int
    ep: int
    inside: bool
    """Whether LoRA is kept in spare rows and columns of the frozen weights."""
    full: bool
    bits: Bits = "none"
    """The form in which frozen experts are held."""

    @property
    def sent(self) -> int:
        """Return the number of rows that this rank sends to experts."""
        return self.t * self.k

    @property
    def chunks(self) -> int:
        """Return the number of chunks in which the experts process their rows."""
        return max(1, -(-int(self.arriving) // chunk_rows(self.f, self.d, self.b)))

    @property
    def letters(self) -> tuple[float, int, int, int, int, int, int]:
        """Return the variables of the experts' formulas: rows, d, f, r, local e, b, and n chunks."""
        return self.arriving, self.d, self.f, self.r, self.local, self.b, self.chunks


def block(base: Family, adapters: AdaptersConfig, rows: Rows, *, ep: int, resident: bool, bits: Bits = "none") -> Block:
    """Return the expert block of one decoder layer, or of one tile of it."""
    experts, family = base.text.experts, adapters.experts
    assert experts is not None
    return Block(
        t=-(-rows.tokens // rows.tiles),
        k=experts.num_experts_per_tok,
        d=base.text.hidden_size,
        e=experts.num_experts,
        arriving=rows.arriving / rows.tiles,
        local=experts.num_experts // ep,
        f=experts.moe_intermediate_size,
        r=family.r if family.mode == "lora" else 0,
        b=rows.itemsize,
        ep=ep,
        inside=family.mode == "lora" and (resident or bits != "none") and not family.dropout,
        full=family.mode == "full",
        bits=bits,
    )


def choice(base: Family, adapters: AdaptersConfig, rows: Rows, *, balances: bool) -> Passes:
    """Return the operations of the router and of its statistics; the statistics are computed once, in forward."""
    assert base.text.experts is not None
    t, b = rows.tokens, rows.itemsize
    d, family = base.text.hidden_size, adapters.router
    e, k = base.text.experts.num_experts, base.text.experts.num_experts_per_tok
    normalises = (WIDE, 2 * WIDE) if base.text.experts.norm_topk_prob else ()
    scored = [*linear(t, d, e, b, family), *touch(t * e, cast(b), 2 * WIDE)]
    picked = touch(t * k, 2 * WIDE + INDEX, *normalises, cast(b))
    chosen = Op("routing", t * e * WIDE + t * k * (WIDE + INDEX), least=TOP_K)
    trains = family.mode != "frozen"
    of_base = [chosen] * trains + [mm(t, d, e, b)] * (family.mode == "full")
    observed = [routing(2, t * e), routing(1, t * k * INDEX), routing(1 + 3 * trains)]
    observed += [
        *touch(t * e, cast(b), WIDE, 2 * WIDE, WIDE),
        *touch(t, 2 * WIDE, 2 * WIDE, WIDE),
        *touch(e, *(WIDE,) * 4 * trains),
    ]
    backward = touch(t * k, cast(b), *((8, 8, 4, 12, 8, 4, 8) if normalises else ()))
    backward += touch(t * e, WIDE, 2 * WIDE, 3 * WIDE, cast(b)) + linear_back(t, d, e, b, family)
    backward += touch(t * d, 3 * b)
    if balances:
        backward += touch(t * e, WIDE + 1, 3 * WIDE) + touch(e, *(2 * WIDE,) * 6)
    forward = [*scored, *of_base, chosen, *picked, *observed]
    return Passes(forward=forward, again=[*scored, *of_base, *picked], backward=backward)


def experts(at: Block, recompute: Recompute) -> Passes:
    """Return the operations from tokens to the sum of their experts' outputs, and back; the sum is not recomputed."""
    there, home = _there(at), _home(at)
    first, wide, rest, end = _forward(at)
    many = at.arriving * 2 * at.f * at.b > KEEP_BYTES  # too much to keep: backward starts again from the rows
    within = [*wide, *rest, *end] if recompute == "layer" else [] if many else rest
    again = [*there, *first, *within, permuted(at.sent, at.d, at.b)]
    if at.ep > 1:
        again.append(permuted(at.arriving, at.d, at.b))
    summed = Op("row permutes", at.b * (at.sent + at.sent * at.d + at.t * at.d), 2 * at.sent * at.d)
    back = [summed, summed, permuted(at.sent, at.d, at.b), *_backward(at)]
    back += [*wide, *rest] if many else []
    back += [permuted(at.arriving, at.d, at.b)] * (2 * (at.ep > 1))
    back += [permuted(at.sent, at.d, at.b), *touch(at.d * at.b, at.sent + at.t)]
    return Passes(
        forward=[*there, *first, *wide, *rest, *end, *home, summed],
        again=again if recompute != "none" else [],
        backward=back,
    )


def _there(at: Block) -> list[Op]:
    """Sort and count the assignments by expert and gather a row for each; with several ranks, sort again on arrival."""
    ops = [Op("routing", at.sent * 3 * INDEX, least=SORT), routing(2, at.sent * 2 * INDEX), routing(2)]
    ops += [routing(1, at.sent * INDEX), routing(1, at.sent * 2 * INDEX), permuted(at.sent, at.d, at.b)]
    if at.ep > 1:
        ops += [routing(14), routing(5, at.arriving * 2 * INDEX), permuted(at.arriving, at.d, at.b)]
    return ops


def _home(at: Block) -> list[Op]:
    """Restore the order of the tokens; with several ranks, first the order of the senders."""
    return [permuted(at.arriving, at.d, at.b)] * (at.ep > 1) + [permuted(at.sent, at.d, at.b)]


def _forward(at: Block) -> tuple[list[Op], list[Op], list[Op], list[Op]]:
    """Return four groups: before the first product, that wide product, up to the end of SwiGLU, the last product."""
    rows, d, f, r, e, b, n = at.letters
    first = [routing(2)]
    if n > 1:
        first.append(routing(2 * n))
    spare = r if at.inside else 0
    up, down = _whole(at)
    wide = [grouped(rows, d, 2 * f + spare, e, b)]
    rest, end = touch(rows * f, 2 * b, 3 * b), [grouped(rows, f + spare, d, e, b)]
    if r:
        rest += [] if at.inside else [grouped(rows, d, r, e, b)]
        rest += [*touch(rows * r, 2 * b), grouped(rows, r, 2 * f, e, b), *touch(rows * 2 * f, 3 * b)]
        rest += [grouped(rows, f, r, e, b), *touch(rows * r, *(2 * b,) * (1 + at.inside))]
        end += [] if at.inside else [grouped(rows, r, d, e, b), *touch(rows * d, 3 * b)]
    if n > 1:
        rest += touch(rows * r, 2 * b, 2 * b) if r else touch(rows * 2 * f, 2 * b)
        rest += touch(rows * d, 2 * b)  # outputs are copied into place even when nothing reads them
    return first, [*up, *_split(wide, n)], _split(rest, n), [*down, *_split(end, n)]


def _backward(at: Block) -> list[Op]:
    rows, d, f, r, e, b, n = at.letters
    spare = r if at.inside else 0
    ops = [grouped(rows, d, f + spare, e, b), *touch(rows * f, 2 * b, *(3 * b,) * 3, 2 * b, 3 * b)]
    ops.append(grouped(rows, 2 * f + spare, d, e, b))
    if r:
        ops += [] if at.inside else [grouped(rows, d, r, e, b), grouped(rows, r, d, e, b), *touch(rows * d, 3 * b)]
        ops += [grouped(rows, r, f, e, b), *touch(rows * f, 3 * b), grouped(rows, 2 * f, r, e, b)]
        ops += touch(rows * r, *(2 * b,) * (2 + at.inside))
    ops += touch(rows * d, 2 * b) if n > 1 else []
    borders = [routing(2 * n)] if n > 1 else []
    up, down = _whole(at)
    return [*up, *down, *borders, *_split(ops, n), *_weight_gradients(at)]


def _whole(at: Block) -> tuple[list[Op], list[Op]]:
    """Return the operations before the first use of gate_up and of down in a pass.

    Packed matrices are unpacked, and LoRA factors are copied into the spare rows and columns.
    """
    room = touch(at.local * at.r * at.d, 2 * at.b) if at.inside else []
    up, down = (unpacked(at.local, out, into, at.b, at.bits) for out, into in ((2 * at.f, at.d), (at.d, at.f)))
    return [*up, *room], [*down, *room]


def _weight_gradients(at: Block) -> list[Op]:
    """Return, per trained matrix and chunk, a product and zeros for experts without rows; chunks are added up."""
    rows, d, f, r, e, b, n = at.letters
    pairs = [(r, d), (r, 2 * f), (r, f), (r, d)] if r else [(2 * f, d), (d, f)] if at.full else []
    ops = []
    for out, into in pairs:
        size = e * out * into
        product = outer(rows / n, out, into, e, b)
        ops += [product._replace(times=n), routing(4 * n), *touch(size, *(2 * b,) * n)]
        ops += touch(size, cast(b), *(2 * WIDE + b,) * (n - 1), cast(b)) if n > 1 else []
    if r:  # the gradients of both B matrices are computed transposed
        ops += touch(e * r, 2 * b * 2 * f, 2 * b * d)
    return ops


def _split(ops: list[Op], chunks: int) -> list[Op]:
    """Divide the work into chunks, each of which reads the matrices of its own experts only."""
    return [op._replace(bytes=op.bytes / chunks, flops=op.flops / chunks, times=op.times * chunks) for op in ops]
