"""The complete configuration, composed of the sections of each package. Loads no torch.

A key is added here in the commit that makes it work; a section without keys refuses every key.
`finetune.settings.recipes` fills it from YAML and the command line, `finetune.settings.checks` looks across sections.
The text below a key explains it to users: docs/configuration.md and `moetune explain` are generated from it
(`finetune/settings/reference.py` describes how).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.config import DataConfig, SourceConfig
from moe.config import MoeConfig


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The training objective. It has no keys yet: every run learns to predict the supervised tokens."""


Bits = Literal["none", "int8", "nf4"]


@dataclass(frozen=True, kw_only=True)
class QuantiseConfig:
    """Forms in which frozen matrices are held in fewer bits. What trains beside them keeps its type."""

    experts: Bits = "none"
    """The form of frozen experts. `none`: `model.dtype`. `int8`: 8 bits a weight, with a scale for each output row.
    `nf4`: about 4.13 bits, in blocks of 64 weights with quantised scales, as bitsandbytes makes them. Weights are
    quantised while they are read, and a layer's experts are unpacked when it computes.

    Change: to `int8` or `nf4` when frozen experts do not fit; a step takes longer, and the base differs a little.
    With: `adapters.experts.mode` (not `full`), `parallel.resident` (either value), `parallel.ep`.
    """
    dense: Bits = "none"
    """The form of the frozen matrices of attention and of MLPs in the decoder: `none`, `int8` or `nf4`, as in
    `model.quantise.experts`. Norms, routers, embeddings, the head and the vision tower keep `model.dtype`.

    Change: to `nf4` when the last gigabyte is missing, or for a dense base.
    With: `adapters.attention.mode`, `adapters.mlp.mode` (neither may be `full`).
    """


AS_THEY_ARE = QuantiseConfig()
"""Nothing is quantised."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model: a family from our table, a local folder with a config.json, or both (then they must agree)."""

    family: str = ""
    """The name of a base in our table, such as `qwen3-vl-30b-a3b`. Empty: the shape is read from `model.path`.

    Change: set it to check and plan without a base on this machine, or when `model.path` is a hub id. Leave it out when
    `model.path` is a folder.
    With: `model.path` (a folder's config.json must describe the same model).
    """
    path: str = ""
    """The base's weights and tokenizer: a local folder, or a hub id, which is downloaded at the start. Training needs
    it; `check` and `plan` do not.

    Change: always, before training. A resumed run may name another place, as long as the weights are the same.
    With: `model.family`, `model.layout`.
    """
    layout: Literal["auto", "hub", "memory", "per_expert"] = "auto"
    """How the base's files hold the experts. `auto`: read from the files' metadata and shapes. `hub`: stacks as
    published, and as transformers 4 writes them. `memory`: stacks as transformers 5 holds them. `per_expert`: one
    matrix for each expert.

    Change: only when the start says that the files could be either.
    With: `model.path`.
    """
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """The type of weights and activations, `bfloat16` or `float32`. Trained parameters have a float32 copy in either
    case.

    Change: to `float32` to compare with a reference, on a CPU or in small models; it doubles the memory.
    With: `model.attention` (float32 leaves `segments` and `sdpa`), `moe.router_float32`.
    """
    attention: Literal["auto", "flash_attention_2", "varlen", "segments", "sdpa"] = "auto"
    """How packed rows attend within their samples. `auto`: the first of these that the machine has.
    `flash_attention_2`: the package flash-attn. `varlen`: torch's own kernel for variable lengths. Both need bfloat16
    and compute capability 8.0. `segments`: torch's sdpa, sample by sample, works everywhere. `sdpa`: sdpa with a mask
    of the complete row.

    Change: to compare kernels, or to avoid one that fails.
    With: `data.tokens_per_pack` (`sdpa` takes rows of up to 8192 tokens), `model.dtype`.
    """
    quantise: QuantiseConfig = field(default_factory=QuantiseConfig)
    """Frozen matrices in 8 or 4 bits. None by default."""


Mode = Literal["frozen", "lora", "full"]


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """Parameters without a low-rank form here: frozen, or trained in full. `lora` is refused with the reason."""

    mode: Mode = "frozen"
    """Whether this part trains. `frozen`: it stays as in the base. `lora`: its matrices get low-rank factors. `full`:
    its weights train themselves, which takes memory for gradients, a float32 copy and two moments. A run with a part in
    mode `lora` writes an adapter, and what trains in full goes into it; a run without writes a complete model.

    Change: to choose what learns. Attention alone is a good start; add experts for new knowledge, the mergers and the
    tower for images unlike any that the base has seen.
    With: `adapters.<part>.lr`, `stages.<name>.train` (which of these parts train in a stage), `optim.lr`.
    """
    lr: float = 0.0
    """The highest learning rate of this part. 0: that of `optim.lr`.

    Change: when parts need different rates: 1e-5 for a merger and 1e-6 for the tower in full, next to 1e-4 for LoRA.
    With: `stages.<name>.lr` (wins in its stage), `schedule.shape` (moves it), `adapters.<part>.mode` (with `frozen` it
    has no effect, and a warning says so).
    """


@dataclass(frozen=True, kw_only=True)
class RouterPartConfig(PartConfig):
    """The routers' score matrices."""

    r: int = 8
    """The rank of the low-rank factors of each router in mode `lora`. 8 is an expert's; nobody has published a
    router's.

    Change: hardly ever; a router is small, and `full` costs little.
    With: `adapters.router.alpha` (twice `r` is usual).
    """
    alpha: float = 16.0
    """The scale of the low-rank part of each router in mode `lora`: the part is multiplied by `alpha / r`.

    Change: together with `r`, so that their ratio stays.
    With: `adapters.router.r`.
    """


@dataclass(frozen=True, kw_only=True)
class DensePartConfig(PartConfig):
    """Matrices that every token passes through. The low-rank part is scaled by alpha / r, with rslora by its root."""

    r: int = 16
    """The rank of the low-rank factors in mode `lora`: how much can be learned, and how large the adapter is. ms-swift
    uses 8 for this model, its authors 64.

    Change: raise it for large data sets or new skills, lower it for small ones. 8 to 64 are usual.
    With: `adapters.<part>.alpha` (twice `r` is usual), `adapters.start_from` (must have the same `r`).
    """
    alpha: float = 32.0
    """The scale of the low-rank part in mode `lora`: the part is multiplied by `alpha / r`, or by `alpha / sqrt(r)`
    with `rslora`. ms-swift uses 32; "LoRA Without Regret" keeps 32 at every `r`.

    Change: together with `r`, or instead of the learning rate.
    With: `adapters.<part>.r`, `adapters.<part>.rslora`.
    """
    rslora: bool = False
    """Whether the low-rank part is scaled by `alpha / sqrt(r)` instead of `alpha / r`.

    Change: to true for high ranks (64 and more), whose changes are otherwise scaled down too far.
    With: `adapters.<part>.alpha`, `adapters.<part>.r`.
    """
    dropout: float = 0.0
    """The share of the low-rank part's inputs that is set to zero in training, from 0 to below 1.

    Change: to 0.05 when a small data set is read for several epochs and the held-out loss rises.
    With: `eval.sources` (measured without dropout).
    """


@dataclass(frozen=True, kw_only=True)
class ExpertPartConfig(DensePartConfig):
    """The experts; r is that of each expert."""

    r: int = 8
    """The rank of the low-rank factors of each expert in mode `lora`. It is lower than that of attention, as each
    expert sees only a part of the tokens. A multiple of 8, or of 4 with `model.dtype=float32`, as the kernels need it.

    Change: raise it for new knowledge from much data. The adapter grows with the number of experts times `r`.
    With: `adapters.experts.alpha` (twice `r` is usual), `model.dtype`, `adapters.start_from` (must have the same `r`).
    """
    alpha: float = 16.0
    """The scale of the low-rank part of each expert in mode `lora`: the part is multiplied by `alpha / r`, or by `alpha
    / sqrt(r)` with `rslora`.

    Change: together with `r`, so that their ratio stays.
    With: `adapters.experts.r`, `adapters.experts.rslora`.
    """


@dataclass(frozen=True, kw_only=True)
class AdaptersConfig:
    """The training mode of each part of the model: frozen, with LoRA or in full. At least one part must train."""

    attention: DensePartConfig = field(default_factory=lambda: DensePartConfig(mode="lora"))
    """Queries, keys, values and output of the decoder's attention, the only part that trains by default. Mode `full`
    includes the norms of queries and keys.
    """
    experts: ExpertPartConfig = field(default_factory=ExpertPartConfig)
    """The experts of mixture-of-experts layers: most of the model's parameters."""
    router: RouterPartConfig = field(default_factory=RouterPartConfig)
    """The routers, which choose the experts of each token. Train them with `moe.balance=global`."""
    mlp: DensePartConfig = field(default_factory=DensePartConfig)
    """The feed-forward matrices of dense decoder layers. A mixture-of-experts base may have none."""
    vision_blocks: DensePartConfig = field(default_factory=DensePartConfig)
    """The blocks of the vision tower."""
    merger: DensePartConfig = field(default_factory=DensePartConfig)
    """The merger, which turns the tower's patches into tokens of the decoder."""
    deepstack_mergers: DensePartConfig = field(default_factory=DensePartConfig)
    """The mergers that carry features of the tower's middle blocks into the first decoder layers."""
    patch_embed: PartConfig = field(default_factory=PartConfig)
    """The tower's embedding of pixels. It has no mode `lora`."""
    pos_embed: PartConfig = field(default_factory=PartConfig)
    """The tower's table of positions. It has no mode `lora`."""
    norms: PartConfig = field(default_factory=PartConfig)
    """The norms of the decoder. They have no mode `lora`."""
    embeddings: PartConfig = field(default_factory=PartConfig)
    """The table of token embeddings. It has no mode `lora`, and cannot train where the base ties it to the head."""
    head: PartConfig = field(default_factory=PartConfig)
    """The matrix that scores the next token. It has no mode `lora`, and cannot train where the base ties it to the
    embeddings.
    """
    start_from: str = ""
    """The folder of an adapter that moetune wrote, whose values training begins with. Empty: low-rank factors begin so
    that the model is the base. The optimiser, the schedule and the data start from the beginning.

    Change: to train an adapter longer, or on other data. To continue an interrupted run, use `checkpoint.resume`.
    With: `adapters.<part>.mode`, `adapters.<part>.r` (must be those of the adapter), `model.path` (the same base).
    """


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The division of the model and the rows among the ranks. All keys may change when a run is resumed."""

    ep: int = field(default=1, metadata={"auto": 0})
    """Expert parallelism: the ranks over which the experts of a layer are spread. 1: every rank has all of them.
    `auto`: the planner chooses the fastest value that fits when the run starts.

    Change: raise it until frozen weights leave half of the GPU free; `moetune plan --fit` proposes a value. Stay within
    a node, as tokens travel to the experts in every layer. 1 for a dense base.
    With: the ranks and the number of experts (it must divide both), `parallel.resident`, `moe.dispatch`.
    """
    sp: int = 1
    """Sequence parallelism: neighbouring ranks that hold slices of one packed row. 1: each rank has whole rows.

    Change: raise it when a row is too long for one GPU, until a rank holds about 32,000 tokens.
    With: the ranks and the attention heads (it must divide both), `data.packs_per_step` (divided among `ranks / sp`),
    `stages.<name>.sp` (another value in a stage), `eval.answers` (needs 1).
    """
    offload_activations: bool = False
    """Whether the tensors that recomputed layers keep for the backward pass are moved to host memory.

    Change: to true for rows of 100,000 tokens and more that do not fit otherwise; ranks of a node share its memory.
    With: `parallel.recompute` (not `none`), `parallel.tile_tokens`.
    """
    tile_tokens: int = 0
    """Tokens that norms and experts process at a time; the backward pass computes the experts once more. 0: all tokens
    of a row at once.

    Change: to 8192 for long rows that do not fit. The result is the same to rounding.
    With: `moe.dispatch` (`deepep` cannot take tiles), `data.tokens_per_pack`.
    """
    resident: Literal["auto", "frozen", "none"] = "auto"
    """Where frozen weights are kept. `frozen`: complete on each rank (experts: its own), so that nothing is gathered.
    `none`: partitioned over the ranks by ZeRO-3 and gathered layer by layer. `auto`: `frozen` if the planner finds room
    for them and 5 % stay free.

    Change: to `none` when memory is short, to `frozen` when you know that they fit.
    With: `parallel.ep` (fewer experts on each rank), `eval.answers` (refused with `none`).
    """
    recompute: Literal["none", "layer", "selective", "auto"] = "selective"
    """The activations that decoder layers recompute in the backward pass to save memory. `none`: none. `selective`: all
    except rows that crossed between ranks and the wide products of the experts. `layer`: the complete layer except the
    router's choice, which keeps the least. `auto`: the planner chooses the fastest value that fits when the run starts.

    Change: to `layer` for long rows or short memory, to `none` when memory is plenty.
    With: `moe.dispatch` (`deepep` cannot take `selective`), `parallel.offload_activations`.
    """


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The combination of token losses into one number."""

    normalise: Literal["token", "sample", "sqrt"] = "token"
    """The unit with equal weight in a step. `token`: every supervised token, so long answers count more. `sample`:
    every sample, whatever its length. `sqrt`: a sample weighs the root of its supervised tokens, the authors' choice.

    Change: to `sample` when short answers matter as much as long ones, to `sqrt` for a mixture of both.
    With: a record's own loss weights (multiplied in), `data.mixture` (how often a source is read).
    """


LOSS_TILE_BYTES = 160 * 2**20
"""Bytes of float32 logits that exist at once: 276 tokens of a vocabulary of 151,936."""
LOSS_SLICES = 8
"""Slices in which a tile's part of the head's gradient is added up, so that no second one of full size exists."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser, AdamW. `moetune check` warns of values outside of those that others have published."""

    lr: float = 1e-4
    """The highest learning rate, of every part that has none of its own. 1e-4 is for LoRA, as in ms-swift's best
    practice for Qwen3-VL.

    Change: to 1e-5 or less for full tuning; to 2e-5 to 5e-4 for LoRA. `moetune check` warns outside of what was
    published.
    With: `adapters.<part>.lr`, `stages.<name>.lr` (these win), `schedule.shape` (moves it), `data.packs_per_step`.
    """
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the mean gradient and of its square, each from 0 to below 1.

    Change: the second to 0.999 when gradients are noisy, as with very small batches.
    """
    eps: float = 1e-8
    """AdamW's least divisor: keeps updates finite where gradients are nearly zero.

    Change: hardly ever.
    """
    weight_decay: float = 0.0
    """AdamW's decay of matrices towards zero in each step, times the learning rate. Vectors (norms, biases) are never
    decayed.

    Change: to 0.01 to 0.1 for full tuning over several epochs. LoRA seldom needs it.
    With: `optim.lr` (multiplies it).
    """
    moments: Literal["float32", "bfloat16"] = "float32"
    """The type in which AdamW's two moments are kept between steps: `float32`, or `bfloat16` for half the memory. They
    are computed in float32 either way.

    Change: to `bfloat16` when memory is short: it saves 4 bytes for each trained parameter. Results differ a little.
    With: `optim.betas` (with `bfloat16` the second must be at most 0.99: a slower mean would not move),
    `optim.offload`.
    """
    offload: bool = False
    """Keep AdamW's moments in host memory, and bring them to the device piece by piece in each step. The results are
    the same, bit for bit.

    Change: to true when memory is short and a step takes seconds: all moments cross the bus twice in each step.
    With: `optim.moments` (`bfloat16` halves that traffic).
    """
    clip_norm: float = 1.0
    """The largest norm of all gradients together; larger ones are scaled down to it. 0: no clipping.

    Change: lower it when the loss has spikes, raise it when every step is clipped (`grad_norm` in `metrics.jsonl`).
    """


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The length of the run, and the shape of the learning rate."""

    steps: int = 1000
    """Optimiser steps of the complete run, of all stages together. When an epoch is over, the next one begins.

    Change: always, unless you set `schedule.epochs`.
    With: `schedule.epochs` (set one of the two), `data.packs_per_step`, `schedule.shape` (falls over all of them),
    `stages.<name>.from_step`.
    """
    epochs: float = 0.0
    """Passes over the data, instead of a number of steps. 0: `schedule.steps` counts. Fractions are allowed.

    The packs of an epoch are planned when a run starts, and the steps follow from them. The last epoch may be partial;
    its share of the steps is rounded. With `data.mixture` tokens or samples an epoch has as many tokens or samples as
    all sources together, drawn by their weights. `warmup_steps` and `decay_steps` are still numbers of steps.

    Change: set it if you prefer to count passes: 1 to 3 for LoRA. In a recipe and its `base:`, the last setting of
    `steps` or `epochs` decides.
    With: `schedule.steps` (set one of the two), `data.remainder` (packs that fill no step), `stages` (they must read
    the same data).
    """
    warmup_steps: int = 0
    """Steps in which the learning rate rises linearly to its highest value, from the first step of the run.

    Change: to about 3 % of `schedule.steps` for full tuning or high rates.
    With: `schedule.steps` (it must not be more), `stages.<name>.warmup_steps` (of a stage, on top).
    """
    shape: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """The shape of the learning rate after the warm-up. `constant`: it stays. `linear`, `cosine`: it falls until the
    last step, linearly or as a cosine. `wsd`: it stays, and falls linearly over the last `decay_steps`.

    Change: to `wsd` or `constant` when the run may become longer than you know now.
    With: `schedule.final_share` (where it ends), `schedule.decay_steps` (`wsd` only).
    """
    decay_steps: int = 0
    """Steps at the end of the run over which `wsd` falls.

    Change: set it with `wsd`, which needs at least 1; 10 % of the run is usual.
    With: `schedule.shape` (another shape does not read it, which is an error).
    """
    final_share: float = 0.0
    """The share of the highest learning rate at which `linear`, `cosine` and `wsd` end, from 0 to 1.

    Change: to 0.1 to keep learning until the end.
    With: `schedule.shape` (`constant` does not read it).
    """


@dataclass(frozen=True, kw_only=True)
class StageDataConfig:
    """Differences of a stage's data from `data:`; keys that are left out keep the values of `data:`."""

    packs_per_step: int | None = None
    """Packed rows of a step in this stage. `null`: `data.packs_per_step`.

    Change: together with the stage's `tokens_per_pack`, to keep the tokens of a step.
    With: `stages.<name>.sp` (the ranks divided by it must divide this).
    """
    tokens_per_pack: int | None = None
    """The most tokens of a packed row in this stage. `null`: `data.tokens_per_pack`.

    Change: to begin with short rows and end with long ones.
    With: `stages.<name>.sp`, `stages.<name>.data.overlong`.
    """
    vision_tokens_per_pack: int | None = None
    """The most tokens of images and videos in a row in this stage. `null`: `data.vision_tokens_per_pack`.

    Change: as `data.vision_tokens_per_pack`.
    With: `stages.<name>.data.tokens_per_pack`.
    """
    mixture: Literal["natural", "tokens", "samples"] | None = None
    """How often each source is read in this stage. `null`: `data.mixture`, which explains the other values.

    Change: when a stage needs shares of its own.
    With: `stages.<name>.data.weights`.
    """
    overlong: Literal["error", "skip", "split-turns"] | None = None
    """The treatment of samples that do not fit a row of this stage. `null`: `data.overlong`, which explains the other
    values.

    Change: to `skip` in a stage of short rows whose long samples come later.
    With: `stages.<name>.data.tokens_per_pack`.
    """
    weights: dict[str, float] = field(default_factory=dict)
    """Shares of some of `data.sources` in this stage, by name: `{charts: 3, everyday: 1}`. A source that is not named
    keeps its own.

    Change: to see a source more often at the end of a run.
    With: `data.mixture` or `stages.<name>.data.mixture` (`natural` allows no weight but 1).
    """


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Changes from a given step on. Every stage builds on the rest of the configuration."""

    from_step: int = 0
    """The first step of this stage; it ends where the next one begins. Steps before the first stage use the rest of the
    configuration.

    Change: for every stage but the one that begins at 0; no two stages may begin together.
    With: `schedule.steps` (must be greater).
    """
    train: list[str] = field(default_factory=list)
    """The parts of `adapters:` that train in this stage; the others do not change. Empty: all that are not frozen.

    Change: to `[merger]` in a first stage that aligns images with text, for example.
    With: `adapters.<part>.mode` (must not be `frozen`; each part that may train needs a stage that trains it).
    """
    lr: float = 0.0
    """The highest learning rate of every part that trains in this stage. 0: that of each part.

    Change: when one rate suits the few parts of a stage better.
    With: `adapters.<part>.lr`, `optim.lr` (it wins over both), `schedule.shape` (goes on over all stages).
    """
    warmup_steps: int = 0
    """Steps in which the learning rate of this stage rises linearly, from its first step.

    Change: to 20 to 50 when a stage changes the data or the trained parts.
    With: `schedule.warmup_steps` (where both apply, they are multiplied).
    """
    sp: int = 0
    """Ranks that share a row in this stage, instead of `parallel.sp`. 0: as there.

    Change: raise it in a stage of longer rows.
    With: `stages.<name>.data.tokens_per_pack`, `eval.answers` (needs 1 in every stage).
    """
    data: StageDataConfig = field(default_factory=StageDataConfig)


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Extension of rotary positions with YaRN."""

    factor: float | None = None
    """The factor by which rotary positions are stretched, above 1. `null`: positions are the base's own. The trained
    model must be served with the same factor; `moetune check` prints how.

    Change: to 2 or 3 when the positions in your data exceed the base's context; the start of a run reports them. Images
    and video use far fewer positions than tokens.
    With: `context.length`, `data.tokens_per_pack`.
    """


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """The context length and its extension."""

    length: int | None = None
    """The context length, in tokens, in the trained model's config.json. `null`: the base's own, or with YaRN the
    base's times its factor.

    Change: with YaRN, when the model should serve more tokens than its positions reach, as with video.
    With: `context.yarn.factor` (without it the length stays the base's; another one is an error).
    """
    yarn: YarnConfig = field(default_factory=YarnConfig)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of the engine beyond the typed keys."""

    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of DeepSpeed's configuration, nested as there. Keys that moetune sets, and those that do not work with it
    (other ZeRO stages, offload, fp16, ...), are refused with the reason when the run starts.

    Change: for DeepSpeed's own diagnostics: `{comms_logger: {enabled: true}}`.
    """


@dataclass(frozen=True, kw_only=True)
class EvalSourceConfig:
    """One set of held-out samples, with bounds that a guard may watch."""

    path: str
    """The held-out samples, as `data.sources.<name>.path`. They are read completely, each sample once.

    Change: always; it has no default. `moetune shards split` makes held-out samples.
    With: `data.sources` (a warning appears if one trains on the same path), `data.image`, `data.video`, `data.chat`
    (samples are prepared as in training).
    """
    map: dict[str, Any] = field(default_factory=dict)
    """The names of columns, as `data.sources.<name>.map`.

    Change: when the held-out rows have no known shape.
    """
    config: str = ""
    """The part of a hub-style folder to read, as `data.sources.<name>.config`. Empty: the only one, or the default.

    Change: when the folder has several.
    With: `eval.sources.<name>.split`.
    """
    split: str = ""
    """The split of a folder of rows to read, as `data.sources.<name>.split`. Empty: `train`, or the only one.

    Change: to `validation` or `test` where the folder that trains has such a split.
    With: `eval.sources.<name>.config`.
    """
    guard: Literal["none", "flag", "stop"] = "none"
    """The action when this source exceeds one of its bounds. `none`: no bounds. `flag`: the log says so. `stop`: the
    run saves and ends.

    Change: to `stop` for samples of skills that the model must not forget.
    With: `eval.sources.<name>.max_kl`, `eval.sources.<name>.max_loss_rise` (at least one is needed).
    """
    max_kl: float | None = None
    """The bound of KL(base || tuned): the allowed distance of answers from the base's, in nats per supervised token.
    `null`: no bound.

    Change: set it for sources whose answers should stay the base's; 0.05 is a start.
    With: `eval.sources.<name>.guard` (must be `flag` or `stop`), `adapters.<part>.mode` (one part must be `lora`, so
    that switching it off gives the base).
    """
    max_loss_rise: float | None = None
    """The allowed rise of the loss above its value before the first step. `null`: no bound.

    Change: set it for sources that must not become worse; 0.1 is a start.
    With: `eval.sources.<name>.guard` (must be `flag` or `stop`).
    """

    @property
    def as_data(self) -> SourceConfig:
        """The samples of the source, named as in a source of `data:`."""
        return SourceConfig(path=self.path, map=self.map, config=self.config, split=self.split)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during training: before the first step, every `every_steps`, and when the run ends."""

    every_steps: int = 200
    """Steps between two evaluations. 0: only before the first step and at the end.

    Change: so that evaluations take a few percent of the time.
    With: `eval.sources` (without any, nothing is evaluated), `eval.patience` (counts evaluations).
    """
    metric: str = ""
    """The metric of the best checkpoint, which is then kept: `<source>/loss`, `<source>/accuracy` or `<source>/kl`.
    Empty: no checkpoint counts as the best.

    Change: set it when the run may become worse towards its end.
    With: `eval.sources` (holds the source), `checkpoint.keep` (the best is kept in addition), `eval.patience`.
    """
    answers: int = 0
    """Questions of each source that the model answers at each evaluation, in `predictions.jsonl`. 0: none.

    Change: to 4 or 8 to read what the model says while it trains. `moetune eval` scores many answers afterwards.
    With: `eval.answer_tokens`, `parallel.resident` (not `none`, which gathers weights for each token), `parallel.sp`
    (must be 1).
    """
    answer_tokens: int = 32
    """The most tokens of each answer.

    Change: to the length of your answers; the time grows with it.
    With: `eval.answers`, `data.tokens_per_pack` (question and answer must fit a row).
    """
    patience: int = 0
    """Evaluations in a row without a better metric that end the run. 0: no limit.

    Change: to 3 to 5 to end a run that has begun to overfit.
    With: `eval.metric` (needed), `eval.every_steps`.
    """
    sources: dict[str, EvalSourceConfig] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Settings for saving and resuming a run."""

    every_steps: int = 200
    """Steps between two checkpoints. 0: only when the run ends, or is stopped by a signal.

    Change: to what you can afford to lose when a machine fails.
    With: `checkpoint.asynchronous`, `checkpoint.keep`.
    """
    keep: int = 3
    """The number of the newest checkpoints that are kept, at least 1. The best by `eval.metric` is kept in addition.

    Change: lower it when the disk is small; `moetune plan` shows the size of one.
    With: `eval.metric`.
    """
    asynchronous: bool = False
    """Whether a checkpoint is copied to host memory and written during the next steps.

    Change: to true when saving takes long. Host memory needs the size of one checkpoint, spread over the ranks.
    With: `checkpoint.every_steps`.
    """
    resume: str = "auto"
    """Where the run begins. `auto`: at the newest checkpoint of its own folder, if there is one. `never`: at step 0. A
    path: at that checkpoint, or the newest of a folder of checkpoints.

    Change: to `never` to start again at step 0 under the same name, to a path to branch off from another run.
    With: all keys that affect training (they must equal those of the checkpoint), `run.name` (the folder).
    """


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Destinations of metrics. `metrics.jsonl` in the run's folder is always written."""

    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases. `off`: not used. `offline`: written to the run's folder, for `wandb sync` later. `online`: sent
    during the run. Its failures never stop a run.

    Change: to `online` to follow runs in a browser; it needs the extra `wandb` and an API key.
    With: `track.project`, `track.entity`, `track.group`, `track.tags`, `track.media`.
    """
    project: str = "moetune"
    """The project at Weights & Biases.

    Change: to keep the runs of a task together.
    With: `track.wandb`.
    """
    entity: str = ""
    """The team or user at Weights & Biases. Empty: the account's default.

    Change: to log to a team.
    With: `track.wandb`.
    """
    group: str = ""
    """The group of this run at Weights & Biases. Empty: none.

    Change: to compare runs that belong together, such as those of a sweep.
    With: `track.wandb`.
    """
    tags: tuple[str, ...] = ()
    """Tags of this run at Weights & Biases.

    Change: to find runs again.
    With: `track.wandb`.
    """
    load_every: int = 20
    """Steps between two records of the load of each expert of each layer, in `expert_load.jsonl`. 0: none.

    Change: lower it to watch the router closely. A record of 235B has about 12,000 numbers, and as many again for each
    kind of token and each source.
    With: `moe.balance`.
    """
    media: Literal["local", "wandb"] = "local"
    """The destination of pictures of the first step. `local`: the run's folder only. `wandb`: also Weights & Biases.

    Change: to `wandb` only when your data may leave your machines.
    With: `track.media_samples`, `track.wandb`.
    """
    tensorboard: bool = False
    """Whether the metrics of steps and evaluations also go to TensorBoard's files, in the run's folder `tensorboard/`.

    Change: to see curves without an account. It needs the extra `tensorboard`.
    With: `track.wandb` (both may be on).
    """
    media_samples: int = 4
    """Samples of the first step that are kept as the model sees them, in `samples.jsonl`, and at most as many of their
    pictures, in `media/`. 0: none.

    Change: raise it to look at more of the data, for example after a change of sizes.
    With: `track.media`.
    """


@dataclass(frozen=True, kw_only=True)
class RunSectionConfig:
    """The run itself, and when it is stopped because something is wrong."""

    name: str = ""
    """The name of the run; its folder is `run.folder/run.name`. Empty: the name of the recipe's file, so that two
    recipes never share a folder.

    Change: for a second run of the same recipe.
    With: `run.folder`, `checkpoint.resume` (`auto` continues the run in that folder).
    """
    folder: str = "runs"
    """The folder in which each run gets a folder of its own, `run.folder/run.name`.

    Change: to keep runs on another disk, or to start from any working directory.
    With: `run.name`; a relative path begins in the working directory of the ranks, which must share the disk.
    """
    seed: int = 0
    """The seed of all random choices: the order of the data, the first values of low-rank factors, dropout.

    Change: to see how much a result depends on chance.
    """
    idle_steps: int = 10
    """Steps in a row with a loss of exactly zero, or with nothing supervised, that end the run.

    Change: raise it when many samples are meant to carry no loss.
    """
    stall_seconds: float = 540.0
    """Seconds after which a rank that is stuck in a step ends, and says what it waited for. 0: never. Ranks must also
    meet within this time at the start; a save may take eight times as long without a new byte.

    Change: raise it when one pass over a row takes minutes, as with a million tokens.
    With: `data.stall_seconds` (should stay shorter, so that a rank without data is named before those that wait for
    it).
    """

    @property
    def path(self) -> Path:
        """Return the folder of this run."""
        return Path(self.folder).expanduser() / self.name


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
