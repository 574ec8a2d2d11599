"""The whole configuration, composed of the floors' own sections. Loads no torch.

A key enters here in the commit that makes it work; a section without keys is a frame that refuses every key.
`finetune.settings.recipes` fills it from YAML and the command line, `finetune.settings.checks` looks across sections.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from data.config import DataConfig
from moe.config import MoeConfig


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is learned from a sample."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model: a family from our table, a local folder with a config.json, or both (then they must agree)."""

    family: str = ""
    path: str = ""  # a local folder or a hub id; training needs it
    layout: Literal["auto", "hub", "memory", "per_expert"] = "auto"  # of the experts in its files; auto: read from them
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of weights and activations; masters are always float32
    # how packed rows attend within their samples; auto is the fastest that the machine has
    attention: Literal["auto", "flash_attention_2", "varlen", "segments", "sdpa"] = "auto"


Mode = Literal["frozen", "lora", "full"]


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """Parameters without a low-rank form here: frozen, or trained in full. `lora` is refused with the reason."""

    mode: Mode = "frozen"
    lr: float = 0.0  # 0: optim.lr


@dataclass(frozen=True, kw_only=True)
class RouterPartConfig:
    """The routers' score matrices."""

    mode: Mode = "frozen"
    lr: float = 0.0  # 0: optim.lr
    r: int = 8  # as an expert's; nobody has published a router's
    alpha: float = 16.0


@dataclass(frozen=True, kw_only=True)
class DensePartConfig:
    """Matrices that every token passes through. The low-rank part is scaled by alpha / r, with rslora by its root."""

    mode: Mode = "frozen"
    lr: float = 0.0  # 0: optim.lr
    r: int = 16  # ms-swift has 8 for this model, its authors 64
    alpha: float = 32.0  # ms-swift's; LoRA Without Regret keeps 32 at every r
    rslora: bool = False
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ExpertPartConfig:
    """The experts; r is that of each expert."""

    mode: Mode = "frozen"
    lr: float = 0.0  # 0: optim.lr
    r: int = 8  # each expert sees a part of the tokens only, so it gets less than attention does
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AdaptersConfig:
    """What is frozen, adapted or trained in full, by family of parameters."""

    # mode full includes the norms of queries and keys; the only family that trains by default
    attention: DensePartConfig = field(default_factory=lambda: DensePartConfig(mode="lora"))
    experts: ExpertPartConfig = field(default_factory=ExpertPartConfig)
    router: RouterPartConfig = field(default_factory=RouterPartConfig)
    mlp: DensePartConfig = field(default_factory=DensePartConfig)  # of dense decoder layers
    vision_blocks: DensePartConfig = field(default_factory=DensePartConfig)
    merger: DensePartConfig = field(default_factory=DensePartConfig)
    deepstack_mergers: DensePartConfig = field(default_factory=DensePartConfig)
    patch_embed: PartConfig = field(default_factory=PartConfig)
    pos_embed: PartConfig = field(default_factory=PartConfig)
    norms: PartConfig = field(default_factory=PartConfig)  # of the decoder
    embeddings: PartConfig = field(default_factory=PartConfig)
    head: PartConfig = field(default_factory=PartConfig)
    start_from: str = ""  # a folder with an adapter of ours, whose values training begins with


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks share the model and the rows."""

    # ranks over which a layer's experts are spread; auto: the fastest that fits by the planner
    ep: int = field(default=1, metadata={"auto": 0})
    sp: int = 1  # ranks that hold slices of one packed row; with it a row may be longer than one rank can hold
    offload_activations: bool = False  # what recomputed layers keep for backward is held in host memory
    # tokens that norms and experts take at a time, the experts once more in backward; 0: all of them at once
    tile_tokens: int = 0
    # frozen weights complete on each rank, or partitioned by ZeRO-3; auto: complete if the planner finds room for them
    resident: Literal["auto", "frozen", "none"] = "auto"
    recompute: Literal["none", "layer", "selective", "auto"] = "selective"  # auto: the fastest that fits


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How token losses become one number."""

    # every token weighs the same, every sample does, or (the authors' choice) a sample weighs the root of its tokens
    normalise: Literal["token", "sample", "sqrt"] = "token"


LOSS_TILE_BYTES = 160 * 2**20
"""Bytes of float32 logits that exist at once: 276 tokens of a vocabulary of 151,936."""
LOSS_SLICES = 8
"""Slices in which a tile's part of the head's gradient is added up, so that no second one of full size exists."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser. Published ranges, with their sources, are in `finetune.settings.published`."""

    lr: float = 1e-4  # for LoRA, as in ms-swift's best practice for Qwen3-VL; full tuning needs 1e-5 or less
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0  # vectors are never decayed
    clip_norm: float = 1.0  # of all gradients together; 0: no clipping


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves."""

    steps: int = 1000
    warmup_steps: int = 0
    # wsd: warm up, stay constant, and decay linearly over the last decay_steps
    shape: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    decay_steps: int = 0  # wsd only
    final_share: float = 0.0  # the share of the rate at which linear, cosine and wsd end


@dataclass(frozen=True, kw_only=True)
class StageDataConfig:
    """Where a stage's data differ from `data:`; keys that are left out stay as they are."""

    packs_per_step: int | None = None
    tokens_per_pack: int | None = None
    vision_tokens_per_pack: int | None = None
    mixture: Literal["natural", "tokens", "samples"] | None = None
    overlong: Literal["error", "skip", "split-turns"] | None = None
    weights: dict[str, float] = field(default_factory=dict)  # of some of data.sources, by name


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What changes at a given step: `stages.<name>`. Every stage builds on the rest of the configuration."""

    from_step: int = 0
    train: list[str] = field(default_factory=list)  # families of `adapters:` that train in it; empty: all that may
    lr: float = 0.0  # of every family that trains in it; 0: that of each family
    warmup_steps: int = 0  # of this stage, on top of the schedule
    sp: int = 0  # instead of parallel.sp; 0: the same. Longer rows need more ranks for each
    data: StageDataConfig = field(default_factory=StageDataConfig)


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Stretched rotary positions: `context.yarn`."""

    factor: float | None = None  # 2 or 3; None: positions are the base's own


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """Length of context and its extension."""

    length: int | None = None  # tokens that the trained model claims to serve; None: as far as its positions reach
    yarn: YarnConfig = field(default_factory=YarnConfig)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of the engine beyond the typed fields."""

    extra: dict[str, Any] = field(default_factory=dict)  # keys of DeepSpeed's config, except those that are made here


@dataclass(frozen=True, kw_only=True)
class EvalSourceConfig:
    """One set of held-out samples: `eval.sources.<name>`. A guard watches it, by the bounds below."""

    path: str  # as data.sources.<name>.path
    guard: Literal["none", "flag", "stop"] = "none"  # beyond a bound: warn, or end the run
    max_kl: float | None = None  # of KL(base || tuned), in nats per supervised token
    max_loss_rise: float | None = None  # of the loss above what it was before the first step


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during training: before the first step, every `every_steps`, and when the run ends."""

    every_steps: int = 200  # 0: only before the first step and at the end
    metric: str = ""  # <source>/loss, <source>/accuracy or <source>/kl: its best checkpoint is kept too
    answers: int = 0  # questions of each source that are answered too, into predictions.jsonl; 0: none
    answer_tokens: int = 32  # at most in an answer; each costs a forward, so frozen weights must be resident
    patience: int = 0  # evaluations without a better metric before the run ends; 0: no limit
    sources: dict[str, EvalSourceConfig] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved, and from where it resumes."""

    every_steps: int = 200  # 0: only when the run ends
    keep: int = 3  # newest checkpoints, besides the best by eval.metric
    asynchronous: bool = False  # copy to host memory and write during the next steps: it needs the size of one save
    resume: str = "auto"  # the newest checkpoint of this run, if any; never; or the folder of a checkpoint


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Where metrics go. metrics.jsonl in the run folder is always written."""

    wandb: Literal["off", "offline", "online"] = "off"  # Weights & Biases; its failures never stop a run
    project: str = "moetune"
    entity: str = ""  # the team; empty: the account's default
    group: str = ""
    tags: tuple[str, ...] = ()
    load_every: int = 20  # steps between two records of each layer's expert load; 0: none
    media: Literal["local", "wandb"] = "local"  # pictures of the data stay in the run folder, or go to W&B as well
    media_samples: int = 4  # pictures of the first step that are kept, as the model sees them


@dataclass(frozen=True, kw_only=True)
class RunSectionConfig:
    """The run itself, and when it is stopped because something is wrong."""

    name: str = ""  # its folder is runs/<name>; empty: the name of the recipe file, so two recipes never share one
    seed: int = 0
    idle_steps: int = 10  # steps in a row with a loss of exactly zero, or with nothing supervised, that end the run
    # seconds after which a rank that stands still in a step ends; 0: never. Longer than the slowest pass over a row,
    # and than data.stall_seconds, so that a rank without data is found before those that wait for it. At the start the
    # ranks must meet within this time, and outside of steps each must write a heartbeat within it; a save may take
    # eight times as long without a new byte
    stall_seconds: float = 540.0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. Quantities that define the training do not change with the number of ranks."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    context: ContextConfig = field(default_factory=ContextConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    run: RunSectionConfig = field(default_factory=RunSectionConfig)
