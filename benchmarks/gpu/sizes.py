"""What is run: the 30B model's sizes on GPUs, and toy sizes on a CPU, so that no typo waits for a GPU."""

from dataclasses import dataclass, replace
from typing import Literal

from finetune.files.tiny import TinyModel


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """Samples that are alike, as the planner takes them: their tokens, and which part of them is seen or learned."""

    sample_tokens: int
    vision_share: float
    supervised_share: float


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """One configuration of `gpu-step`: layers of the model, and the words of its recipe.

    Its samples are of many lengths, every other one about a photograph; or all alike, where `assumed` says how.
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
    """Lengths of the samples in each row that attention is tried on."""
    patches: int
    model: TinyModel
    """The text model's sizes are those measured; `layers` is replaced by each case."""
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
    """A step of `micro_batches` rows on each rank."""
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
    """The 30B model's sizes."""
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
    """Everything small enough for two CPU cores."""
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
    """What to run here, and what torch says of the GPUs and of the libraries that decide speed."""
    import torch  # here, so that a part's process does not load it before it has to

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
