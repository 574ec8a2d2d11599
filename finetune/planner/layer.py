"""Lists the operations of the decoder and the head in one micro-batch. Loads no torch.

They are those that transformers, PEFT and `moe/` run; a test counts the same on the meta device. The copies of sliced
rows are taken from the code, not counted, and norms in tiles are counted as one.
"""

from finetune.architecture.families import Family
from finetune.config import AS_THEY_ARE, LOSS_SLICES, LOSS_TILE_BYTES, AdaptersConfig, Bits, QuantiseConfig
from finetune.planner.activations import INDEX, Reach, Recompute, Rows
from finetune.planner.experts import block, choice, experts
from finetune.planner.operations import (
    WIDE,
    Op,
    Passes,
    linear,
    linear_again,
    linear_back,
    mm,
    norm,
    norm_back,
    routing,
    touch,
    turn,
    unpacked,
)

BACKWARD = 2.5
"""Ratio of the operations of attention's backward to those of its forward: backward recomputes the scores."""


def decoder_layer(
    base: Family,
    adapters: AdaptersConfig,
    rows: Rows,
    recompute: Recompute,
    *,
    squares: float,
    sparse: bool,
    ep: int = 1,
    sp: int = 1,
    resident: bool = True,
    balances: bool = False,
    quantise: QuantiseConfig = AS_THEY_ARE,
) -> Passes:
    """Return the operations of one layer with experts (`sparse`) or a plain MLP.

    `squares` is the sum of the samples' squared lengths, divided by sp.
    """
    t, b = rows.tokens, rows.itemsize
    reach, full = Reach.of(adapters), adapters.norms.mode == "full"
    seen = _attention(base, adapters, rows, squares, sp, quantise.dense)
    size = t * base.text.hidden_size
    before, added = norm(size, t, b), touch(size, 3 * b)
    parts = [_mlp(base, adapters, rows, quantise.dense)]
    if sparse:
        parts = [choice(base, adapters, rows, balances=balances)]
        tile = experts(
            block(base, adapters, rows, ep=ep, resident=resident, bits=quantise.experts),
            "layer" if rows.tiles > 1 else recompute,
        )
        parts.append(_tiled(tile, rows.tiles, recompute))
    forward = [*before, *seen.forward, *added, *before, *(op for part in parts for op in part.forward), *added]
    if not reach.layers:
        return Passes(forward=forward)
    again = [*before, *seen.forward, *added, *before, *(op for part in parts for op in part.again)]
    back = [*norm_back(size, t, b, full=full), *added]
    return Passes(
        forward=forward,
        again=again if recompute != "none" else [],
        backward=[*(op for part in parts for op in part.backward), *back, *seen.backward, *back],
    )


def _tiled(tile: Passes, tiles: int, recompute: Recompute) -> Passes:
    """Multiply one tile. Each is recomputed in its own backward; a recomputed layer first runs all but the last."""
    if tiles == 1:
        return tile

    def several(ops: list[Op], number: int) -> list[Op]:
        return [op._replace(times=op.times * number) for op in ops if number]

    return Passes(
        forward=several(tile.forward, tiles),
        again=several(tile.forward, tiles - 1) if recompute != "none" else [],
        backward=several([*tile.again, *tile.backward], tiles),
    )


def _attention(
    base: Family, adapters: AdaptersConfig, rows: Rows, squares: float, sp: int, bits: Bits = "none"
) -> Passes:
    """Return projections, norms of queries and keys, rotation, the kernel and the last projection; and backward."""
    t, b = rows.tokens, rows.itemsize
    d, head = base.text.hidden_size, base.text.head_dim
    heads, kv = base.text.num_attention_heads, base.text.num_key_value_heads
    wide, narrow = heads * head, kv * head
    q, k = t * wide, t * narrow
    table = t * head
    family = adapters.attention
    full = family.mode == "full"
    enter = [*linear(t, d, wide, b, family), *norm(q, t * heads, b), *linear(t, d, narrow, b, family)]
    enter += [*norm(k, t * kv, b), *linear(t, d, narrow, b, family), *turn(q, table, b), *turn(k, table, b)]
    enter += touch(table, b, 2 * b)  # sines, the first half of them negative
    lse, flops = WIDE * t * heads, 4 * heads * head * squares / 2
    kernel = Op("attention", b * (2 * q + 2 * k) + lse, flops)
    slices = touch(q + 2 * k, 2 * b, 2 * b) + touch(q, 2 * b, 2 * b) if sp > 1 else []
    back = [*linear_back(t, wide, d, b, family), *touch(lse, 1), routing(1)]
    back += [*slices, Op("attention", b * (4 * q + 4 * k) + lse, BACKWARD * flops)]
    back += [*turn(k, table, b), *turn(q, table, b)]
    back += [op for part in (q, k, k) for op in touch(part, b, 2 * b)] + touch(q, 2 * b) + touch(k, 2 * b, 2 * b)
    back += [*norm_back(q, t * heads, b, full=full), *norm_back(k, t * kv, b, full=full)]
    back += [op for out in (wide, narrow, narrow) for op in linear_back(t, d, out, b, family)]
    back += touch(t * d, 3 * b, 3 * b)
    whole = [
        op for out, into in ((wide, d), (narrow, d), (narrow, d), (d, wide)) for op in unpacked(1, out, into, b, bits)
    ]
    back += whole
    return Passes(forward=[*whole, *enter, *slices, kernel, *linear(t, wide, d, b, family)], backward=back)


def _mlp(base: Family, adapters: AdaptersConfig, rows: Rows, bits: Bits = "none") -> Passes:
    t, b = rows.tokens, rows.itemsize
    family = adapters.mlp
    d, inner = base.text.hidden_size, base.text.intermediate_size
    enter = [*linear(t, d, inner, b, family), *linear(t, d, inner, b, family), *touch(t * inner, 2 * b, 3 * b)]
    back = [*linear_back(t, inner, d, b, family), *touch(t * inner, 3 * b, 3 * b, 3 * b)]
    back += [*linear_back(t, d, inner, b, family), *linear_back(t, d, inner, b, family), *touch(t * d, 3 * b)]
    whole = [op for out, into in ((inner, d), (inner, d), (d, inner)) for op in unpacked(1, out, into, b, bits)]
    enter, back = [*whole, *enter], [*whole, *back]
    again = [*enter, *linear_again(t, inner, d, b, family)]
    return Passes(forward=[*enter, *linear(t, inner, d, b, family)], again=again, backward=back)


def head(base: Family, rows: Rows, *, trained: bool, passes: bool) -> Passes:
    """Return loss and gradients by tiles of supervised tokens, which all run in forward."""
    v, d = base.text.vocab_size, base.text.hidden_size
    b, count = rows.itemsize, rows.supervised
    size = min(max(1, LOSS_TILE_BYTES // (WIDE * v)), count)
    ops: list[Op] = touch(count, 3 * WIDE, 3 * WIDE, 4 * WIDE) + touch(1, 3 * WIDE)
    for n, times in ((size, count // size), (count % size, 1)) if size else ():
        tile = [mm(n, d, v, b), *touch(n * v, WIDE + b, WIDE, 2 * WIDE, 2 * WIDE, WIDE)]
        tile += touch(n, 3 * WIDE, 2 * WIDE, 3 * WIDE, 2 * WIDE)
        if trained or passes:
            tile += [*touch(n * v, WIDE, 2 * WIDE, WIDE + b), *touch(n, 3 * WIDE, 2 * WIDE, 2 * WIDE + INDEX)]
        tile += [mm(n, v, d, b)] if passes else []
        if trained:
            part = [mm(v / LOSS_SLICES, n, d, b), *touch(v * d / LOSS_SLICES, 2 * WIDE + b)]
            tile += [op._replace(times=LOSS_SLICES) for op in part]
        ops += [op._replace(times=op.times * times) for op in tile if n]
    ops += touch(v * d, WIDE, WIDE + b) if trained else []
    back = touch(count * d, *(2 * b,) * passes) + touch(v * d, *(2 * b,) * trained)
    return Passes(forward=ops, backward=[*back, *touch(count, WIDE)] if back else [])


def around(base: Family, adapters: AdaptersConfig, rows: Rows) -> Passes:
    """Return what runs once per micro-batch: embedding, rotary tables, insertion of the tower's tokens, last norm.

    These operations are taken from the code, not counted; they amount to a few tenths of one layer.
    """
    text, vision = base.text, base.vision
    t, b = rows.tokens, rows.itemsize
    size, reach = t * text.hidden_size, Reach.of(adapters)
    seen = rows.patches // vision.spatial_merge_size**2 * text.hidden_size
    levels = len(vision.deepstack_visual_indexes) if seen else 0
    places = [*touch(size, *(3 * b,) * (seen > 0), *(2 * b,) * levels), *touch(seen, *(2 * b, 3 * b, 2 * b) * levels)]
    forward = [*touch(size, 2 * b), *touch(t * text.head_dim, *(2 * WIDE,) * 18), *places, *norm(size, t, b)]
    back = norm_back(size, t, b, full=adapters.norms.mode == "full") + touch(size, *(2 * b, 2 * b) * levels)
    return Passes(forward=forward, backward=back if reach.layers else [])
