"""`long-memory`: a rank's peak memory per additional token of a row, with each memory-saving option."""

from collections.abc import Iterator, Mapping

from benchmarks.harness.figure import Figure, Peer, Target, ratio_at_least
from benchmarks.harness.outputs import same_tensors
from benchmarks.long_rows.long_ranks import RankResult, Setup, measure, together

TOKENS = (1536, 3072)
PLAIN = "recompute by layer, sp 1"
TILE = 128


def cases(sp: int) -> Mapping[str, dict[str, object]]:
    """Options by name of the case; tiles have the same size for every length of row."""
    return {
        f"no recompute, sp {sp}": {"recompute": "none"},
        f"recompute by layer, sp {sp}": {},
        f"recompute by layer, tiled, sp {sp}": {"tiles": TILE},
        f"recompute by layer, offloaded, sp {sp}": {"offload": True},
        f"recompute by layer, tiled and offloaded, sp {sp}": {"tiles": TILE, "offload": True},
        f"recompute selective, sp {sp}": {"recompute": "selective"},
        f"recompute selective, offloaded, sp {sp}": {"recompute": "selective", "offload": True},
    }


def run() -> Iterator[Figure]:
    """Yield bytes per token: the growth of the peak over that of the row; recompute by layer is the peer."""
    slopes: dict[str, float] = {}
    for sp in (1, 2):
        setups, names = [], []
        for name, options in cases(sp).items():
            for tokens in TOKENS:
                tiles = tokens // sp // TILE if options.get("tiles") else 1
                setups.append(Setup(tokens=tokens, sp=sp, **{**options, "tiles": tiles}))  # type: ignore[arg-type]  # of cases()
            names.append(name)
        ranks = measure(setups, world=sp)
        for at, name in enumerate(names):
            pair = ranks[2 * at : 2 * at + 2]
            for ranks_of_row, plain in zip(pair, ranks[2:4], strict=True):
                same_tensors(together(ranks_of_row), together(plain), relative=1e-5)
            slopes[name] = slope(pair)
    for name, bytes_a_token in slopes.items():
        yield Figure(
            f"peak by one more token, {name}",
            bytes_a_token,
            "bytes a token of the row",
            config={"tokens": list(TOKENS)},
            peer=Peer(PLAIN, slopes[PLAIN]),
            target=_target(name),
        )


def slope(pair: list[list[RankResult]]) -> float:
    """Return the growth of the worst rank's peak per additional token of the row."""
    peaks = [max(rank.peak for rank in ranks) for ranks in pair]
    return (peaks[1] - peaks[0]) / (TOKENS[1] - TOKENS[0])


def _target(name: str) -> Target | None:
    if name == "recompute by layer, sp 2":
        return ratio_at_least(1.7, goal=1.9)
    if "tiled and offloaded" in name:
        return ratio_at_least(1.3)
    return None
