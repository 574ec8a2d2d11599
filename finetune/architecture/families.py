"""The Qwen3-VL sizes: every value of their published config.json, as frozen tables. Loads no torch.

Each published file was reproduced byte for byte from this table, and `config_sha256` is its hash, so no value here is a
guess. Sources of the hashes: 2B, 4B and 8B from public download manifests that pin a revision of the hub's repository;
30B-A3B and 235B-A22B from public notes that fingerprint the file (for 235B, Instruct and Thinking share it); 32B from
git's id of the file (29e925092dee9f14278c53e7e7d876cea8a997bc). The other editions are assumed to have the same file as
their size; `moetune verify-base` compares a real folder with this table.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions of the text model: base, sections for time, height, width, and YaRN if `type` is yarn."""

    theta: float = 5_000_000
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    mrope_interleaved: bool = True
    type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture-of-experts part of a text model."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Text:
    """The language model. `experts` is None for the dense sizes."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    experts: Experts | None = None
    head_dim: int = 128
    vocab_size: int = 151_936
    max_position_embeddings: int = 262_144
    rope: Rope = Rope()
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    bos_token_id: int = 151_643
    eos_token_id: int = 151_645
    use_cache: bool = True
    dtype: str = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Vision:
    """The vision tower with its merger and its DeepStack mergers."""

    out_hidden_size: int
    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    num_position_embeddings: int = 2304
    hidden_act: str = "gelu_pytorch_tanh"
    initializer_range: float = 0.02


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model size: the values of its config.json, under the name that `model.family` takes."""

    name: str
    text: Text
    vision: Vision
    hub_id: str | None = None
    config_sha256: str | None = None
    tie_word_embeddings: bool = False
    image_token_id: int = 151_655
    video_token_id: int = 151_656
    vision_start_token_id: int = 151_652
    vision_end_token_id: int = 151_653

    @property
    def is_moe(self) -> bool:
        """Return whether the text model has expert layers."""
        return self.text.experts is not None

    @property
    def model_type(self) -> str:
        """Return the hub's `model_type`."""
        return "qwen3_vl_moe" if self.is_moe else "qwen3_vl"

    @property
    def architecture(self) -> str:
        """Return the name of the class that transformers builds."""
        return "Qwen3VLMoeForConditionalGeneration" if self.is_moe else "Qwen3VLForConditionalGeneration"

    @property
    def head_sizes(self) -> tuple[int, int]:
        """Return the size of an attention head of the text model, and of one of the vision tower."""
        return self.text.head_dim, self.vision.hidden_size // self.vision.num_heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Return the indexes of the layers whose MLP is a mixture of experts, by transformers' rule."""
        experts = self.text.experts
        if experts is None:
            return ()
        return tuple(
            layer
            for layer in range(self.text.num_hidden_layers)
            if layer not in experts.mlp_only_layers and (layer + 1) % experts.decoder_sparse_step == 0
        )


def family_names() -> tuple[str, ...]:
    """Return every name that `model.family` takes: dense sizes first, then mixture-of-experts sizes."""
    return tuple(_FAMILIES)


def family(name: str) -> Family:
    """Return the entry for a name such as `qwen3-vl-30b-a3b`, or a hub id such as `Qwen/Qwen3-VL-30B-A3B-Instruct`."""
    size = name.lower().removeprefix("qwen/").removesuffix("-instruct").removesuffix("-thinking")
    if size in _FAMILIES:
        return _FAMILIES[size]
    close = difflib.get_close_matches(size, _FAMILIES, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}? " if close else "check the spelling. "
    raise ValueError(
        f"model.family: {name!r} is not a known family; {hint}The known families are {', '.join(_FAMILIES)}. "
        f"For any other size, give the folder that contains its config.json."
    )


def _size(
    label: str,
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    sha256: str,
    expert_hidden: int | None = None,
    small_tower: bool = False,
    tied: bool = False,
) -> Family:
    """Return one row of the table; all other values are equal in all published sizes."""
    experts = Experts(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=expert_hidden or 0)
    tower = Vision(out_hidden_size=hidden)
    if small_tower:
        tower = replace(tower, depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=(5, 11, 17))
    return Family(
        name=f"qwen3-vl-{label.lower()}",
        hub_id=f"Qwen/Qwen3-VL-{label}-Instruct",
        config_sha256=sha256,
        tie_word_embeddings=tied,
        text=Text(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            experts=experts if expert_hidden else None,
        ),
        vision=tower,
    )


_TABLE = (
    _size(
        "2B",
        hidden=2048,
        intermediate=6144,
        layers=28,
        heads=16,
        kv_heads=8,
        small_tower=True,
        tied=True,
        sha256="bec4b3d446efa05807365c9e1cec03ac590836879d02f3a6da879971154bdd3b",
    ),
    _size(
        "4B",
        hidden=2560,
        intermediate=9728,
        layers=36,
        heads=32,
        kv_heads=8,
        small_tower=True,
        tied=True,
        sha256="edac7703329133edfc53e46ac0081835144c99d7eebf28b71c732694d435224d",
    ),
    _size(
        "8B",
        hidden=4096,
        intermediate=12_288,
        layers=36,
        heads=32,
        kv_heads=8,
        sha256="5cd452860dc1e9c29dd71cc3cef7f39b338b7a40793f7a260655c2d3568f3661",
    ),
    _size(
        "32B",
        hidden=5120,
        intermediate=25_600,
        layers=64,
        heads=64,
        kv_heads=8,
        sha256="d2dd0c60d01b9e195d9447c52da61c7302d28828524914c044d9c6e1b81d0427",
    ),
    # No layer of the MoE sizes uses `intermediate`: decoder_sparse_step is 1 and mlp_only_layers is empty.
    _size(
        "30B-A3B",
        hidden=2048,
        intermediate=6144,
        layers=48,
        heads=32,
        kv_heads=4,
        expert_hidden=768,
        sha256="6129b3f54d517a18553cf7525ff4886be6831c5806fc094d632b8ef38d859912",
    ),
    _size(
        "235B-A22B",
        hidden=4096,
        intermediate=12_288,
        layers=94,
        heads=64,
        kv_heads=4,
        expert_hidden=1536,
        sha256="a9b0434bf1bb5de21786cb3dc3abf95e7254a1e131557c911d7271d2fb63e476",
    ),
)
# The model that `moetune tiny` writes by default.
_TINY_MOE = Family(
    name="tiny-moe",
    text=Text(
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        experts=Experts(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=40),
        head_dim=16,
        vocab_size=1024,
        max_position_embeddings=4096,
        rope=Rope(mrope_section=(4, 2, 2)),
        bos_token_id=992,
        eos_token_id=994,
        dtype="float32",
    ),
    vision=Vision(
        out_hidden_size=48,
        depth=4,
        hidden_size=24,
        intermediate_size=56,
        num_heads=2,
        deepstack_visual_indexes=(1, 2, 3),
        num_position_embeddings=64,
    ),
    image_token_id=1004,
    video_token_id=1005,
    vision_start_token_id=1001,
    vision_end_token_id=1002,
)
_TINY_DENSE = replace(_TINY_MOE, name="tiny-dense", text=replace(_TINY_MOE.text, experts=None))

_FAMILIES = {entry.name: entry for entry in (*_TABLE, _TINY_MOE, _TINY_DENSE)}
