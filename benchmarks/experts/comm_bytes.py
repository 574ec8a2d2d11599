"""`comm-bytes`: traffic of one micro-batch by collective and group, compared with the same model on plain ZeRO-3."""

from collections.abc import Iterator

from benchmarks.experts.expert_ranks import EXPERTS, HIDDEN, LAYERS, Counted, Setup, by_kind, count, gathered
from benchmarks.harness.figure import Figure, Peer, at_most
from benchmarks.harness.outputs import same_tensors

WORLD = 2
SETUPS = {
    "plain": Setup(side="plain"),
    "partitioned": Setup(side="ours"),
    "resident": Setup(side="ours", resident=True),
}
PEER = "transformers + ZeRO-3, no expert parallelism"


def run() -> Iterator[Figure]:
    """Yield the weights gathered in one micro-batch at ep = world, as multiples of the model's weights."""
    counts = dict(zip(SETUPS, count(list(SETUPS.values()), world=WORLD), strict=True))
    plain = counts["plain"]
    for name in ("partitioned", "resident"):
        for rank in range(WORLD):
            same_tensors({"logits": counts[name][rank].logits}, {"logits": plain[rank].logits}, relative=1e-5)
    weights, dense = plain[0].weights, 1 - plain[0].experts / plain[0].weights
    assert dense <= 0.15, f"the model should be mostly experts, {dense:.0%} of it are not"
    floors = {"partitioned": 2 * dense, "resident": 0.0}
    for name, floor in floors.items():
        yield Figure(
            f"weights gathered a micro-batch, {name}",
            _worst(counts[name]) / weights,
            "x weights",
            config=_config(dense, counts[name][0], plain[0]),
            peer=Peer(PEER, _worst(plain) / weights),
            target=at_most(floor),
        )
    yield Figure(
        "trained weights gathered an update, resident",
        _update(counts["resident"]) / weights,
        "x weights",
        config=_config(dense, counts["resident"][0], plain[0]),
    )


def _worst(ranks: list[Counted]) -> int:
    return max(gathered(rank.micro_batch) for rank in ranks)


def _update(ranks: list[Counted]) -> int:
    return max(gathered(rank.update) for rank in ranks)


def _config(dense: float, ours: Counted, plain: Counted) -> dict[str, object]:
    return {
        "ranks": WORLD,
        "ep": WORLD,
        "layers": LAYERS,
        "hidden": HIDDEN,
        "experts": EXPERTS,
        "dense_share": round(dense, 4),
        "weights_bytes": plain.weights,
        "ours_bytes": by_kind(ours.micro_batch),
        "ours_update_bytes": by_kind(ours.update),
        "peer_bytes": by_kind(plain.micro_batch),
    }
