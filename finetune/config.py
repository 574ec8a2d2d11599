"""The whole configuration, composed of the floors' own sections. Loads no torch.

A key enters here in the commit that makes it work; a section without keys is a frame that refuses every key.
`finetune.recipes` fills it from YAML and the command line, `finetune.checks` looks across sections.
"""

from dataclasses import dataclass, field

from data.config import DataConfig
from moe.config import MoeConfig


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is learned from a sample."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model: a family from our table, a local folder with a config.json, or both (then they must agree)."""

    family: str = ""
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class AdaptersConfig:
    """What is frozen, adapted or trained in full, by family of parameters."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks share the model."""

    ep: int = 1


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How token losses become one number."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser."""

    lr: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What changes at a given step: `stages.<name>`."""


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """Length of context and its extension."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the engine is told beyond the typed fields."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during training."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When state is saved, and what a start resumes from."""


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Where metrics go."""


@dataclass(frozen=True, kw_only=True)
class RunSectionConfig:
    """The run itself."""

    seed: int = 0


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
