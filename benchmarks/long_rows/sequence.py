"""`sequence`: bytes that attention moves per layer for a row over two ranks, and its time compared with one rank."""

from collections.abc import Iterator

from benchmarks.harness.figure import Figure, Peer
from benchmarks.harness.measure import counted
from benchmarks.harness.outputs import same_tensors
from benchmarks.long_rows.long_ranks import HEAD_DIM, HEADS, KV_HEADS, LAYERS, Setup, measure, together
from finetune.model.sequence_attention import key_copies

TOKENS = 2048
PASSES = {"none": 2, "layer": 3, "selective": 3}
"""Forward and backward, plus a second forward where attention is recomputed."""


def run() -> Iterator[Figure]:
    """Yield counted bytes by recompute mode, which must equal the formula; then the seconds of one row."""
    setups = [Setup(tokens=TOKENS, sp=2, recompute=mode) for mode in ("none", "layer", "selective")]
    ranks = measure(setups, world=2)
    (whole,) = measure([Setup(tokens=TOKENS, sp=1, recompute="none")], world=1)
    for setup, of_ranks in zip(setups, ranks, strict=True):
        same_tensors(together(of_ranks), together(whole), relative=1e-5)
        yield counted(
            f"handed to attention's all-to-alls a layer, recompute {setup.recompute}",
            max(rank.exchanged for rank in of_ranks) // LAYERS,
            "bytes a rank",
            expected=PASSES[setup.recompute] * bytes_per_layer(slices=2),
            config={"tokens": TOKENS, "sp": 2, "heads": HEADS, "kv_heads": KV_HEADS},
        )
    yield Figure(
        "a row over two ranks, forward and backward",
        max(rank.seconds for rank in ranks[0]),
        "s",
        config={"tokens": TOKENS, "sp": 2, "threads_a_rank": 1},
        peer=Peer("one rank, the whole row", whole[0].seconds),
    )


def bytes_per_layer(*, slices: int) -> int:
    """Return the bytes that one rank passes to the two all-to-alls of a layer's forward, its own part included.

    Backward moves as many. Recompute repeats both exchanges in its second forward.
    """
    both_ways = 2 * HEADS + 2 * KV_HEADS * key_copies(KV_HEADS, slices)
    return both_ways * HEAD_DIM * (TOKENS // slices) * 4  # float32
