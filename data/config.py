"""The `data:` section. Loads no torch."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One named source of samples: `data.sources.<name>`."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read and how it is packed. Every quantity is global: none changes with the number of ranks."""

    packs_per_step: int = 32
    tokens_per_pack: int = 8192
    sources: dict[str, SourceConfig] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How large an image may be, in tokens: `data.image`. One token is 32 x 32 pixels in every model of the family."""

    min_tokens: int | None = None  # None: the base's own limit (preprocessor_config.json), 64 as released
    max_tokens: int | None = None  # None: the base's own limit, 16384 as released
