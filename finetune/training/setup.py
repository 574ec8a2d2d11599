"""From a configuration to the options of model, engine and balance; what was chosen is said in sentences."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from data.config import DataConfig
from data.render.sample import Renderer
from data.stream.corpus import Corpus
from data.stream.reach import reach
from finetune.architecture.families import Family
from finetune.architecture.yarn import Extension, extension, need_lines, serving_lines
from finetune.config import RunConfig
from finetune.files.hub import model_folder
from finetune.model.empty import ModelOptions
from finetune.model.forward import PackedModel
from finetune.model.lora import settle
from finetune.model.recompute import set_recompute
from finetune.model.sequence import SequenceGroup
from finetune.model.tiled_norm import tile_norms
from finetune.model.varlen import machine, register
from finetune.planner.foresight import resident_here
from finetune.ranks.collectives import barrier, rank_and_world
from finetune.ranks.engine import EngineOptions
from finetune.settings.attention import choose_attention
from finetune.settings.stages import longest_pack, run_stages
from moe.balance import Balance
from moe.host import LEAST_BYTES
from moe.parallel import LayerOptions
from moe.router import RouterOptions

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def fetch_base(path: str) -> Path:
    """The base's folder; a hub id is fetched by rank 0 first. Every rank must call this."""
    if not path:
        raise ValueError(
            "model.path: training needs a base model. Set it to a folder (`moetune tiny` makes a small one) or a hub id"
        )
    if rank_and_world()[0] == 0:
        model_folder(path)
    barrier()
    return model_folder(path)


def model_options(config: RunConfig, base: Family, device: torch.device, say: Callable[[str], None]) -> ModelOptions:
    """What is built, trained and kept where."""
    dtype = DTYPES[config.model.dtype]
    register()
    longest = longest_pack(run_stages(config))
    attention = choose_attention(
        config.model.attention, tokens=longest, machine=machine(device, dtype), head_sizes=base.head_sizes
    )
    say(f"attention: {attention.reason}")
    resident = resident_here(config, base)
    say(f"frozen weights {'resident' if resident.resident else 'partitioned'}: {resident.reason}")
    layer = LayerOptions(
        router=RouterOptions(float32=config.moe.router_float32),
        resident=resident.resident,
        dispatch=config.moe.dispatch,
        deepep_max_tokens=-(-longest // config.parallel.sp),
        seed=config.run.seed,
        tiles=_tiles(config),
    )
    options = ModelOptions(
        ep_size=config.parallel.ep,
        layer=layer,
        resident=resident.resident,
        dtype=dtype,
        attention=attention.name,
        context=extension(config.context, base),
    )
    return settle(config.adapters, options)


def _tiles(config: RunConfig) -> int:
    """Parts in which a rank's tokens go through the experts: by the longest rows, so that all ranks make as many."""
    tile = config.parallel.tile_tokens
    tokens = max(-(-stage.data.tokens_per_pack // stage.sp) for stage in run_stages(config))
    return -(-tokens // tile) if tile else 1


def save_memory(packed: PackedModel, config: RunConfig) -> str:
    """Switch on what trades time for memory over long rows, and say it."""
    parallel = config.parallel
    host_from_bytes = LEAST_BYTES if parallel.offload_activations else None
    set_recompute(packed.model, parallel.recompute, host_from_bytes=host_from_bytes)
    packed.host_from_bytes = host_from_bytes
    norms = tile_norms(packed.model, parallel.tile_tokens) if parallel.tile_tokens else 0
    tiled = f"; {norms} norms in tiles of {parallel.tile_tokens:,} tokens, experts in {_tiles(config)} tiles a row"
    where = ", kept in host memory" if host_from_bytes else ""
    return f"activations: recompute {parallel.recompute}{where}" + (tiled if parallel.tile_tokens else "")


def engine_options(config: RunConfig) -> EngineOptions:
    """What decides a step; of how many micro-batches it is, the loop says itself, as stages and last steps differ."""
    optim = config.optim
    return EngineOptions(
        clip_norm=optim.clip_norm,
        dtype=config.model.dtype,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        extra=config.engine.extra,
    )


def make_balance(config: RunConfig, base: Family, device: torch.device) -> Balance | None:
    """Balance loss and load statistics of the sparse layers; None for a dense base."""
    experts = base.text.experts
    if experts is None:
        return None
    return Balance(
        mode=config.moe.balance,
        coefficient=config.moe.balance_coefficient,
        z_coefficient=config.moe.z_coefficient,
        layers=len(base.moe_layers),
        experts=experts.num_experts,
        top_k=experts.num_experts_per_tok,
        device=device,
    )


def share_rows(packed: PackedModel, balance: Balance | None, group: SequenceGroup | None) -> None:
    """From now on the ranks of this group hold slices of one row; None: each rank has whole rows."""
    packed.sequence = group
    if balance is not None:
        balance.share_rows(group.ranks if group else None)


def context_lines(
    context: Extension | None, base: Family, corpora: Iterable[Corpus], renderer: Renderer, data: DataConfig
) -> list[str]:
    """What the largest position in the data says about the context, and how the trained model is to be served."""
    native = base.text.rope.original_max_position_embeddings or base.text.max_position_embeddings
    cache = Path(data.cache_dir) if data.cache_dir else None
    found = max(
        (reach(corpus, renderer, enough=native, cache_dir=cache) for corpus in corpora), key=lambda r: r.positions
    )
    lines = need_lines(base, context, largest=found.positions, exact=found.exact, sample=found.sample)
    return [*lines, *serving_lines(base, context)]
