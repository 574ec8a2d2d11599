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
    layout: Literal["auto", "hub", "memory", "per_expert"] = "auto"  # of the experts in its files; auto: they say it
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of weights and activations; masters are float32 in any case
    # how packed rows attend inside their samples; auto is the fastest that the machine has
    attention: Literal["auto", "flash_attention_2", "varlen", "segments", "sdpa"] = "auto"


Mode = Literal["frozen", "lora", "full"]


@dataclass(frozen=True, kw_only=True)
class FamilyConfig:
    """Parameters that have no low-rank form here: frozen, or trained in full. `lora` is refused with the reason."""

    mode: Mode = "frozen"
    lr: float = 0.0  # 0: optim.lr


@dataclass(frozen=True, kw_only=True)
class RouterFamilyConfig:
    """The routers' score matrices."""

    mode: Mode = "frozen"
    lr: float = 0.0  # 0: optim.lr
    r: int = 8  # as an expert's; nobody has published a router's
    alpha: float = 16.0


@dataclass(frozen=True, kw_only=True)
class DenseFamilyConfig:
    """Matrices that every token passes through. The low-rank part is scaled by alpha / r, with rslora by its root."""

    mode: Mode = "frozen"
    lr: float = 0.0  # 0: optim.lr
    r: int = 16  # ms-swift has 8 for this model, its authors 64
    alpha: float = 32.0  # ms-swift's; LoRA Without Regret keeps 32 at every r
    rslora: bool = False
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ExpertFamilyConfig:
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

    # with the norms of queries and keys, in mode full; the one family that trains unless told otherwise
    attention: DenseFamilyConfig = field(default_factory=lambda: DenseFamilyConfig(mode="lora"))
    experts: ExpertFamilyConfig = field(default_factory=ExpertFamilyConfig)
    router: RouterFamilyConfig = field(default_factory=RouterFamilyConfig)
    mlp: DenseFamilyConfig = field(default_factory=DenseFamilyConfig)  # of dense decoder layers
    vision_blocks: DenseFamilyConfig = field(default_factory=DenseFamilyConfig)
    merger: DenseFamilyConfig = field(default_factory=DenseFamilyConfig)
    deepstack_mergers: DenseFamilyConfig = field(default_factory=DenseFamilyConfig)
    patch_embed: FamilyConfig = field(default_factory=FamilyConfig)
    pos_embed: FamilyConfig = field(default_factory=FamilyConfig)
    norms: FamilyConfig = field(default_factory=FamilyConfig)  # of the decoder
    embeddings: FamilyConfig = field(default_factory=FamilyConfig)
    head: FamilyConfig = field(default_factory=FamilyConfig)
    start_from: str = ""  # a folder with an adapter of ours, whose values training begins with


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks share the model and the rows."""

    # ranks over which a layer's experts are spread; auto: the fastest that fits by the planner
    ep: int = field(default=1, metadata={"auto": 0})
    sp: int = 1  # ranks that hold slices of one packed row; with it a row may be longer than one rank can hold
    offload_activations: bool = False  # what recomputed layers keep for backward waits in host memory
    # norms and experts take so many tokens at a time, the experts once more in backward; 0: all of them at once
    tile_tokens: int = 0
    # frozen weights whole on each rank, or partitioned by ZeRO-3; auto: whole where the planner finds room for them
    resident: Literal["auto", "frozen", "none"] = "auto"
    recompute: Literal["none", "layer", "selective", "auto"] = "selective"  # auto: the fastest that fits


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How token losses become one number."""

    # every token weighs the same, every sample does, or (the authors' choice) a sample weighs the root of its tokens
    normalise: Literal["token", "sample", "sqrt"] = "token"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser. Ranges that others published, with their sources, are in `finetune.settings.published`."""

    lr: float = 1e-4  # for LoRA, as ms-swift's best practice for Qwen3-VL has it; full tuning wants 1e-5 and less
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0  # never of vectors
    clip_norm: float = 1.0  # of all gradients together; 0: none


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves."""

    steps: int = 1000
    warmup_steps: int = 0
    # wsd: warm up, stay, and come down in a straight line over the last decay_steps
    shape: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    decay_steps: int = 0  # of wsd
    final_share: float = 0.0  # of the rate, where linear, cosine and wsd end


@dataclass(frozen=True, kw_only=True)
class StageDataConfig:
    """What a stage reads otherwise than `data:` says; what is left out stays."""

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
    lr: float = 0.0  # of every family that trains in it; 0: each family's own
    warmup_steps: int = 0  # of this stage, on top of the schedule
    sp: int = 0  # instead of parallel.sp; 0: the same. Longer rows want more ranks to hold each
    data: StageDataConfig = field(default_factory=StageDataConfig)


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Stretched rotary positions: `context.yarn`."""

    factor: float | None = None  # 2 or 3; None: positions are the base's own


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """Length of context and its extension."""

    length: int | None = None  # tokens that the trained model is said to serve; None: as far as positions reach
    yarn: YarnConfig = field(default_factory=YarnConfig)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the engine is told beyond the typed fields."""

    extra: dict[str, Any] = field(default_factory=dict)  # keys of DeepSpeed's config; none that we make


@dataclass(frozen=True, kw_only=True)
class EvalSourceConfig:
    """One set of held-out samples: `eval.sources.<name>`. A guard watches it, by the bounds that are given."""

    path: str  # as data.sources.<name>.path
    guard: Literal["none", "flag", "stop"] = "none"  # beyond a bound: say so, or end the run
    max_kl: float | None = None  # of KL(base || tuned), in nats a supervised token
    max_loss_rise: float | None = None  # of the loss above what it was before the first step


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during training: before the first step, every so many, and when the run ends."""

    every_steps: int = 200  # 0: only before the first step and at the end
    metric: str = ""  # <source>/loss, <source>/accuracy or <source>/kl: the checkpoint where it is best is kept too
    answers: int = 0  # of each source, so many questions are answered too, into predictions.jsonl; 0: none
    answer_tokens: int = 32  # an answer's length at most; each costs a forward, so frozen weights must be resident
    patience: int = 0  # evaluations without a better metric before the run ends; 0: it never ends for that
    sources: dict[str, EvalSourceConfig] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When state is saved, and what a start resumes from."""

    every_steps: int = 200  # 0: only when the run ends
    keep: int = 3  # the newest so many, beside the one where eval.metric is best
    asynchronous: bool = False  # copy to the host's memory, write behind the run: costs the host what is saved, once
    resume: str = "auto"  # the newest of this run, if any; never; or a checkpoint's folder


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Where metrics go. metrics.jsonl in the run folder is written in any case."""

    wandb: Literal["off", "offline", "online"] = "off"  # Weights & Biases; what goes wrong with it never stops a run
    project: str = "moetune"
    entity: str = ""  # the team; empty: the account's own
    group: str = ""
    tags: tuple[str, ...] = ()
    load_every: int = 20  # steps between two records of each layer's expert load; 0: none
    media: Literal["local", "wandb"] = "local"  # pictures out of the data stay in the run folder, or go to W&B as well
    media_samples: int = 4  # pictures of the first step that are kept, as the model sees them


@dataclass(frozen=True, kw_only=True)
class RunSectionConfig:
    """The run itself, and when it is ended because it cannot go well."""

    name: str = "run"  # its folder is runs/<name>
    seed: int = 0
    idle_steps: int = 10  # so many steps in a row with a loss of exactly zero, or with nothing supervised
    # longer than the slowest pass over a row, and than data.stall_seconds: so that a rank without data is found before
    # those that wait for it; 0: wait for ever. The ranks must meet within it at the start, and outside of steps each
    # must be heard within it; a save may stand eight times as long without a new byte
    stall_seconds: float = 540.0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. Sections are fixed; quantities that define the training do not change with the number of ranks."""

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
