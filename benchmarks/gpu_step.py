"""`gpu-step`: whole steps of four layers of the 30B model on one GPU, beside transformers, PEFT and DeepSpeed."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.figure import Figure, Target
from benchmarks.load import start_ranks
from benchmarks.measure import spread
from benchmarks.start_adapter import ADAPTERS
from benchmarks.train_step import PEER, STEPS, race_side, same_losses
from finetune.flops import FlopMeter, Work, peak_flops, trainings
from finetune.hubconfig import read_family
from finetune.tiny import TinyModel, write_tiny

MODEL = TinyModel(
    hidden=2048, experts=128, top_k=8, expert_hidden=768, layers=4, heads=32, kv_heads=4, head_dim=128,
    dtype="bfloat16", shard_bytes=2_000_000_000, max_positions=32768,
)  # fmt: skip
CASES = ((4096, 1), (16384, 1), (4096, 4))
RELATIVE = 2e-2
"""How far losses may be apart in bfloat16, as a share of the largest."""


def run() -> Iterator[Figure]:
    """Yield tokens per second and peak memory of each case, by what is recomputed."""
    yield from figures("cuda", MODEL, CASES)


def figures(accelerator: str, model: TinyModel, cases: tuple[tuple[int, int], ...]) -> Iterator[Figure]:
    """The same on any device. `utilisation` counts what training needs, not what is computed again."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        write_tiny(base, model)
        meter = FlopMeter(read_family(base), trainings(ADAPTERS))
        start_ranks(1, "adapter", base, module="benchmarks.train_ranks")
        sides = {
            (side, recompute): race_side(
                side, base, cases, "--dtype", "bfloat16", "--recompute", recompute, ranks=1, accelerator=accelerator
            )
            for side, recompute in (("ours", "layer"), ("ours", "selective"), ("peer", "layer"))
        }
    device = torch.cuda.get_device_name() if accelerator == "cuda" else accelerator
    peak = peak_flops(device)
    for at, (tokens, micro_batches) in enumerate(cases):
        peer = sides["peer", "layer"][at]
        for recompute in ("layer", "selective"):
            mine = sides["ours", recompute][at]
            same_losses(mine, peer, RELATIVE)
            work = Work(tokens=tokens, supervised=tokens - 1, squares=tokens**2)
            rate = micro_batches * meter.model(work) / min(mine["seconds"])
            config = {
                "tokens": tokens, "micro_batches": micro_batches, "recompute": recompute, "layers": model.layers,
                "dtype": "bfloat16", "device": device, "tflops": rate / 1e12,
                "utilisation": rate / peak if peak else None,
            }  # fmt: skip
            useful, what = tokens * micro_batches, f"{micro_batches} x {tokens} tokens, recompute {recompute}"
            yield Figure(
                metric=f"useful tokens/s, {what}", unit="tokens/s", better="higher", config=config, n=STEPS - 1,
                value=useful / min(mine["seconds"]), peer=f"{PEER}, recompute layer",
                spread={"ours": spread(mine["seconds"]), "peer": spread(peer["seconds"])},
                peer_value=useful / min(peer["seconds"]), target=Target(of="ratio", rule="at least", floor=1.0),
            )  # fmt: skip
            yield Figure(
                metric=f"peak memory, {what}", unit="bytes", config=config, value=mine["peak"],
                peer=f"{PEER}, recompute layer", peer_value=peer["peak"],
            )  # fmt: skip
