"""`waits`: number and places of the host's waits for the device in a micro-batch; the tower has its real depth."""

from collections.abc import Iterator

from benchmarks.harness.figure import Figure, Peer, at_most, exactly
from benchmarks.harness.outputs import same_tensors
from benchmarks.harness.spawned import on_ranks

ROWS = ("text", "media")
LAYERS = (4, 6)
TOWER_BLOCKS = 27
LIMITS = {"text": 12, "media": 25}
PEER = "transformers and PEFT, recompute layer, inputs and positions given on the device"


def run() -> Iterator[Figure]:
    """Yield the waits of one row's forward and backward by place in the code, and those per decoder layer."""
    from benchmarks.device.waits_case import Waits, count  # loads torch, which listing does not need

    few, many = (on_ranks(1, count, layers, TOWER_BLOCKS, ROWS)[0] for layers in LAYERS)
    for kind in ROWS:
        counted: Waits = few[kind]
        same_tensors({"loss": counted.ours_loss}, {"loss": counted.peer_loss}, relative=1e-5)
        yield Figure(
            f"waits per micro-batch, {kind}",
            sum(counted.ours.values()),
            "waits",
            config={"layers": LAYERS[0], "tower_blocks": TOWER_BLOCKS, "ours": counted.ours, "peer": counted.peer},
            peer=Peer(PEER, sum(counted.peer.values())),
            target=at_most(LIMITS[kind], goal=0),
        )
        more = sum(many[kind].ours.values()) - sum(counted.ours.values())
        yield Figure(
            f"waits of a decoder layer, {kind}",
            more / (LAYERS[1] - LAYERS[0]),
            "waits",
            config={"layers": LAYERS},
            target=exactly(0),
        )
