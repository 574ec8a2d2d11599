"""Sizes of the parts: those of the 30B model on GPUs, and toy sizes on a CPU, to find typos without a GPU."""

from dataclasses import dataclass, replace
from typing import Literal

from finetune.files.tiny import TinyModel


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """Identical samples, as the planner assumes them: their tokens, and the shares of vision and supervised tokens."""

    sample_tokens: int
    vision_share: float
    supervised_share: float


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """One configuration of `gpu-step`: number of layers, and the words of its recipe.

    Samples have many lengths, and every second one is about a photograph; with `assumed`, all samples are alike.
    """

    name: str
    layers: int
    words: tuple[str, ...]
    assumed: Assumed | None = None


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of every part; `world` is the number of visible GPUs."""

    name: Literal["full", "toy"]
    device: Literal["cuda", "cpu"]
    gpu: str
    world: int
    heads: tuple[int, int, int]
    """Query heads, key heads, head size."""
    samples: tuple[tuple[int, ...], ...]
    """Lengths of the samples in each row for the attention part."""
    patches: int
    model: TinyModel
    """The model to measure; each case replaces `layers`."""
    local_experts: tuple[int, ...]
    layer_tokens: tuple[int, ...]
    expert_tokens: tuple[int, ...]
    exchange_rows: int
    steps: tuple[StepCase, ...]
    whole: tuple[StepCase, ...]
    whole_bytes: int
    """Memory that all layers need."""
    ranks: tuple[StepCase, ...]
    rounds: int


def case(layers: int, tokens: int, *, micro_batches: int = 1, recompute: str = "selective", ep: int = 1) -> StepCase:
    """Return a case with `micro_batches` rows on each rank."""
    name = f"{layers} layers, {micro_batches} x {tokens} tokens, recompute {recompute}, ep {ep}"
    words = (
        "qwen3-vl-30b-a3b-lora",
        f"data.tokens_per_pack={tokens}",
        f"data.packs_per_step={micro_batches * ep}",
        f"parallel.recompute={recompute}",
        f"parallel.ep={ep}",
        "parallel.resident=frozen",
    )
    return StepCase(name=name, layers=layers, words=words)


def full(gpu: str, world: int) -> Sizes:
    """Return the sizes of the 30B model."""
    return Sizes(
        name="full",
        device="cuda",
        gpu=gpu,
        world=world,
        heads=(32, 4, 128),
        rounds=4,
        samples=((4096,), (1, 17, 333, 1021, 2047, 677), (64,) * 61 + (63,), (8191, 1)),
        patches=16384,
        model=TinyModel(
            hidden=2048,
            intermediate=6144,
            experts=128,
            top_k=8,
            expert_hidden=768,
            heads=32,
            kv_heads=4,
            head_dim=128,
            vision_depth=27,
            vision_hidden=1152,
            vision_intermediate=4304,
            vision_heads=16,
            layers=4,
            max_positions=262_144,
            vocabulary=151_936,
            dtype="bfloat16",
        ),
        local_experts=(128, 16),
        layer_tokens=(4096, 8192),
        expert_tokens=(1024, 4096, 16384),
        exchange_rows=65_536,
        steps=(
            case(4, 4096),
            case(4, 8192),
            case(4, 8192, recompute="layer"),
            case(4, 4096, micro_batches=4),
            case(8, 8192),
            case(8, 8192, recompute="layer"),
        ),
        whole=(case(48, 4096), case(48, 8192), case(48, 8192, recompute="layer")),
        whole_bytes=100 * 10**9,
        ranks=(case(8, 8192, ep=world), case(8, 8192, ep=world, recompute="layer")),
    )


def toy() -> Sizes:
    """Return sizes that are small enough for two CPU cores."""
    return Sizes(
        name="toy",
        device="cpu",
        gpu="cpu",
        world=2,
        heads=(4, 2, 16),
        rounds=1,
        samples=((40,), (1, 7, 33)),
        patches=64,
        model=TinyModel(dtype="bfloat16", vocabulary=2048, max_positions=2048),
        local_experts=(8, 4),
        layer_tokens=(48,),
        expert_tokens=(40,),
        exchange_rows=64,
        steps=(case(2, 1024), case(3, 1024, micro_batches=2, recompute="layer")),
        whole=(replace(case(3, 1024), assumed=Assumed(sample_tokens=500, vision_share=0.5, supervised_share=0.2)),),
        whole_bytes=0,
        ranks=(case(2, 1024, ep=2),),
    )


def look() -> tuple[Sizes, dict[str, object]]:
    """Return the sizes for this machine, and torch's facts about the GPUs and the libraries that affect speed."""
    import torch  # not at the top, so that a part's process loads it only when needed

    from benchmarks.gpu.device import cudnn_version, nccl_version

    if not torch.cuda.is_available():
        return toy(), {"cuda": None}
    first, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
    return full(first.name, count), {
        "cuda": torch.version.cuda,
        "cudnn": cudnn_version(),
        "nccl": nccl_version(),
        "capability": [first.major, first.minor],
        "memory_bytes": first.total_memory,
        "peers": [torch.cuda.can_device_access_peer(0, other) for other in range(1, count)],
    }
