"""`mem-per-rank`: a rank's part of a frozen base, counted and as anonymous memory, compared with the formula."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness.figure import Figure, at_most
from benchmarks.weights.load import MODEL, start_ranks
from finetune.architecture.families import Family
from finetune.architecture.rank_shares import rank_shares
from finetune.architecture.shapes import parameter_shapes
from finetune.files.hubconfig import read_family
from finetune.files.tiny import write_tiny


def kept_per_rank(base: Family, *, world: int, ep: int, resident: bool) -> int:
    """Return the formula's bytes of float32 weights that a rank keeps."""
    shapes = parameter_shapes(base)
    return rank_shares(shapes, world_size=world, ep_size=ep, itemsize=4, resident=resident)[0].kept


def run() -> Iterator[Figure]:
    """Yield the error of the formula for several layouts, against counted bytes and against anonymous memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "base"
        write_tiny(folder, MODEL)
        base = read_family(folder)
        for world, ep, resident in ((1, 1, True), (2, 1, True), (2, 2, True), (2, 2, False), (4, 2, False)):
            formula = kept_per_rank(base, world=world, ep=ep, resident=resident)
            words = ["--ep", str(ep), *(["--resident"] if resident else [])]
            ranks = start_ranks(world, "ours", folder, *words)
            config = {"world": world, "ep": ep, "resident": resident, "formula": formula}
            for metric, key in (("weights kept, counted", "held"), ("weights kept, anonymous memory", "kept")):
                worst = max((rank[key] for rank in ranks), key=lambda value: abs(value / formula - 1))
                yield Figure(
                    f"{metric}, over the formula",
                    worst / formula - 1,
                    "",
                    config=config,
                    target=at_most(0.05) if key == "held" else None,
                )
