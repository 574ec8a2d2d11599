"""`waits`: how often the host waits for the device in a micro-batch, and where; the tower has its real depth."""

from collections.abc import Iterator

from benchmarks.harness.figure import Figure, Target
from benchmarks.harness.outputs import same_tensors
from benchmarks.harness.spawned import on_ranks

ROWS = ("text", "media")
LAYERS = (4, 6)
TOWER_BLOCKS = 27
LIMITS = {"text": 12, "media": 25}
PEER = "transformers and PEFT, recompute layer, inputs and positions given on the device"


def run() -> Iterator[Figure]:
    """Yield the waits of one row's forward and backward by its place in the code, and those of one decoder layer."""
    from benchmarks.device.waits_case import Found, count  # torch, which a list of benchmarks has no need of

    few, many = (on_ranks(1, count, layers, TOWER_BLOCKS, ROWS)[0] for layers in LAYERS)
    for kind in ROWS:
        found: Found = few[kind]
        same_tensors({"loss": found.ours_loss}, {"loss": found.peer_loss}, relative=1e-5)
        yield Figure(
            metric=f"waits a micro-batch, {kind}", value=sum(found.ours.values()), unit="waits", peer=PEER,
            config={"layers": LAYERS[0], "tower_blocks": TOWER_BLOCKS, "ours": found.ours, "peer": found.peer},
            peer_value=sum(found.peer.values()), target=Target(of="value", rule="at most", floor=LIMITS[kind], goal=0),
        )  # fmt: skip
        more = sum(many[kind].ours.values()) - sum(found.ours.values())
        yield Figure(
            metric=f"waits of a decoder layer, {kind}", value=more / (LAYERS[1] - LAYERS[0]), unit="waits",
            config={"layers": LAYERS}, target=Target(of="value", rule="exactly", floor=0),
        )  # fmt: skip
