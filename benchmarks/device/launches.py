"""`launches`: operations that one decoder layer of the 30B model launches, compared with stock parts."""

from collections.abc import Iterator

from benchmarks.device.meta_layer import MetaLayer
from benchmarks.harness.figure import Figure, Peer
from finetune.architecture.families import Text, family
from finetune.config import AdaptersConfig, DensePartConfig, ExpertPartConfig

TOKENS = (4096, 8192)
R = 16
ADAPTERS = AdaptersConfig(attention=DensePartConfig(mode="lora", r=R), experts=ExpertPartConfig(mode="lora", r=R))
PEER = "transformers grouped_mm, PEFT"


def run() -> Iterator[Figure]:
    """Yield operations of forward, recompute and backward for each number of tokens, and the bytes moved."""
    yield from figures(family("qwen3-vl-30b-a3b").text, TOKENS)


def figures(text: Text, tokens: tuple[int, ...]) -> Iterator[Figure]:
    """Yield the same at any size; nothing is computed, so it needs no memory."""
    for number in tokens:
        ours, peer = (_passes(MetaLayer(text, ADAPTERS, ours=is_ours), number) for is_ours in (True, False))
        for (what, unit), count in ours.items():
            yield Figure(
                f"of a layer, {number} tokens, {what}",
                count,
                unit,
                config={"tokens": number, "recompute": "layer", "hidden": text.hidden_size, "r": R},
                peer=Peer(PEER, peer[what, unit]),
            )


def _passes(layer: MetaLayer, tokens: int) -> dict[tuple[str, str], float]:
    """Count the passes; the difference between a backward with and without recompute is the recompute itself."""
    (forward, plain), (_, both) = layer.count(tokens, "none"), layer.count(tokens, "layer")
    counts: dict[tuple[str, str], float] = {
        ("forward", "operations"): forward.launches,
        ("recompute", "operations"): both.launches - plain.launches,
        ("backward", "operations"): plain.launches,
        ("all", "operations"): forward.launches + both.launches,
    }
    every = (*forward.kinds.values(), *both.kinds.values())
    return counts | {("read and written", "GB"): sum(count.bytes for count in every) / 1e9}
