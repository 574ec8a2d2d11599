"""Puts a run together, from its configuration to model, data, weights and engine, and reports what it chose."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.config import DataConfig
from data.format.printable import count_of
from data.render.sample import Renderer
from data.render.vision import read_spec
from data.stream.corpus import Corpus
from data.stream.reach import reach
from finetune.adapters.file import open_adapter
from finetune.adapters.provenance import Provenance, parent_line
from finetune.architecture.families import Family
from finetune.architecture.yarn import Extension, check_rotary, extension, need_lines, serving_lines
from finetune.checkpoint.adapter import adapter_writer
from finetune.checkpoint.checkpoints import Checkpoints
from finetune.config import RunConfig
from finetune.files.basefiles import BaseFiles, open_base
from finetune.files.hub import lasting_name, model_folder
from finetune.files.hubconfig import read_family
from finetune.model.build import build
from finetune.model.empty import EmptyModel, ModelOptions, bits_of
from finetune.model.forward import PackedModel
from finetune.model.lora import table_lines, trainable_table, with_adapters
from finetune.model.recompute import set_recompute
from finetune.model.sequence import SequenceGroup, sequence_groups
from finetune.model.sequence_attention import use_sequence
from finetune.model.tiled_norm import tile_norms
from finetune.model.varlen import machine, register
from finetune.model.weights import load_weights
from finetune.planner.foresight import Foresight, resident_here
from finetune.ranks.collectives import barrier, rank_and_world
from finetune.ranks.engine import EngineOptions, engine_config, engine_device, initialize
from finetune.ranks.log import RankLog
from finetune.ranks.watch import Watch
from finetune.settings.attention import choose_attention
from finetune.settings.derive import derive
from finetune.settings.recipes import effective
from finetune.settings.stages import Stage, longest_pack, run_stages, stage_of
from finetune.tracking.token_groups import TokenGroups, token_groups
from finetune.training.evaluation import Evaluation
from finetune.training.optimiser_groups import trained_groups
from finetune.training.steps import RunData
from moe.balance import Balance
from moe.config import LEAST_HOST_BYTES
from moe.parallel import LayerOptions
from moe.router import RouterOptions

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Run:
    """All parts of a run. `RunState` has the values that change from step to step."""

    config: RunConfig
    folder: Path
    say: RankLog
    watch: Watch
    device: torch.device
    stages: Sequence[Stage]
    base: Family
    base_files: BaseFiles
    empty: EmptyModel
    model: PackedModel
    balance: Balance | None
    groups: TokenGroups | None
    """Numbers the kinds and sources by which the load of the experts is counted; None for a dense base."""
    sequence_groups: Mapping[int, SequenceGroup | None]
    """The ranks that share a row with this one, by group size; None for complete rows."""
    data: RunData
    evaluation: Evaluation
    foresight: Foresight
    engine: Any
    checkpoints: Checkpoints
    provenance: Provenance
    """The origin of its adapter, as far as it is known before the first step."""

    def stage(self, step: int) -> Stage:
        """Return the stage that a step belongs to."""
        return stage_of(self.stages, step)

    def share_rows(self, sp: int) -> None:
        """Make groups of `sp` ranks share rows from now on, with a slice of the row on each rank."""
        share_rows(self.model, self.balance, self.sequence_groups[sp])


def assemble(config: RunConfig, folder: Path, say: RankLog, watch: Watch, *, rehearses: bool = False) -> Run:
    """Put a run together, from its base to its engine; every rank must call this.

    A run that `rehearses` evaluates one row of each source.
    """
    device = engine_device()
    stages = run_stages(config)
    say("\n".join(number.text for number in derive(config, ranks=rank_and_world()[1])))

    watch.stage("base and empty model")
    base_folder = fetch_base(config.model.path)
    base = read_family(base_folder)
    groups_by_size = sequence_groups(stage.sp for stage in stages)
    balance = make_balance(config, base, device)
    options = model_options(config, base, device, say)
    empty = build(base_folder, options, balance=balance)
    if max(groups_by_size) > 1:
        use_sequence(empty.module, groups_by_size, options.attention)
    say("\n".join(table_lines(trainable_table(empty))))

    watch.stage("data")
    renderer = Renderer(base_folder, image=config.data.image, video=config.data.video, chat=config.data.chat)
    data = RunData(stages, renderer, seed=config.run.seed, groups=groups_by_size)
    config = data.count(config)
    stages = run_stages(config)
    say("\n".join(data.lines()))
    watch.reading = data.reading
    evaluation = Evaluation(
        config,
        renderer,
        trainable_table(empty),
        base_folder=base_folder,
        resident=options.resident,
        say=say,
        watch=watch,
        rehearses=rehearses,
    )
    if rank_and_world()[0] == 0:
        say("\n".join(context_lines(empty.context, base, data.corpora, renderer, config.data)))

    watch.stage("weights and engine")
    base_files = open_base(base_folder, empty.expected, layout=config.model.layout)
    start = open_adapter(Path(config.adapters.start_from)) if config.adapters.start_from else None
    loaded = load_weights(empty, base_files, engine_config=engine_config(engine_options(config)), start=start)
    say(f"loaded: rank 0 read {loaded.bytes_read:,} bytes and keeps {loaded.bytes_held:,}")
    foresight = Foresight(config, base, folder, say=say)
    foresight.weights(loaded.bytes_held)
    say(check_rotary(empty.module, base, empty.context))
    model = PackedModel(empty.module, spec=read_spec(base_folder), normalise=config.loss.normalise)
    say(save_memory(model, config))
    engine = initialize(model, engine_options(config), trained_groups(empty, stages))
    engine.train()
    torch.manual_seed(config.run.seed * 100_003 + rank_and_world()[0])  # for dropout; a checkpoint brings its own state
    provenance = Provenance(
        base=base_files,
        base_name=lasting_name(config.model.path),
        config=effective(config),
        # read now, because the file may be gone when an adapter is written
        parent=parent_line(start.folder) if start is not None and rank_and_world()[0] == 0 else "",
    )
    checkpoints = Checkpoints(
        engine,
        empty,
        folder / "checkpoints",
        base=base_files,
        keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous,
        adapter_writer=adapter_writer(empty, base=provenance.base_name, provenance=provenance),
        busy=watch.busy,
    )
    return Run(
        config=config,
        folder=folder,
        say=say,
        watch=watch,
        device=device,
        stages=stages,
        base=base,
        base_files=base_files,
        empty=empty,
        model=model,
        balance=balance,
        groups=token_groups(config, base, renderer) if balance is not None else None,
        sequence_groups=groups_by_size,
        data=data,
        evaluation=evaluation,
        foresight=foresight,
        engine=engine,
        checkpoints=checkpoints,
        provenance=provenance,
    )


def fetch_base(path: str) -> Path:
    """Return the base's folder; rank 0 downloads a hub id first. Every rank must call this."""
    if not path:
        raise ValueError(
            "model.path: training needs a base model. Set it to a folder (`moetune tiny` makes a small one) or a hub id"
        )
    if rank_and_world()[0] == 0:
        model_folder(path)
    barrier()
    return model_folder(path)


def model_options(config: RunConfig, base: Family, device: torch.device, say: Callable[[str], None]) -> ModelOptions:
    """Choose the parts to build and to train, and where the weights are kept."""
    dtype = DTYPES[config.model.dtype]
    register()
    longest = longest_pack(run_stages(config))
    attention = choose_attention(
        config.model.attention, tokens=longest, machine=machine(device, dtype), head_sizes=base.head_sizes
    )
    say(f"attention: {attention.reason}")
    residency = resident_here(config, base)
    say(f"frozen weights {'resident' if residency.resident else 'partitioned'}: {residency.reason}")
    layer = LayerOptions(
        router=RouterOptions(float32=config.moe.router_float32),
        resident=residency.resident,
        bits=bits_of(config.model.quantise.experts),
        dispatch=config.moe.dispatch,
        deepep_max_tokens=-(-longest // config.parallel.sp),
        seed=config.run.seed,
        tiles=_tiles(config),
    )
    options = ModelOptions(
        ep_size=config.parallel.ep,
        layer=layer,
        resident=residency.resident,
        dtype=dtype,
        dense_bits=bits_of(config.model.quantise.dense),
        attention=attention.name,
        context=extension(config.context, base),
    )
    return with_adapters(config.adapters, options)


def _tiles(config: RunConfig) -> int:
    """Return the number of tiles of a rank's tokens in the experts, by the longest rows: equal on all ranks."""
    tile = config.parallel.tile_tokens
    tokens = max(-(-stage.data.tokens_per_pack // stage.sp) for stage in run_stages(config))
    return -(-tokens // tile) if tile else 1


def save_memory(packed: PackedModel, config: RunConfig) -> str:
    """Switch on the options that trade time for memory on long rows, and return a sentence about them."""
    parallel = config.parallel
    host_from_bytes = LEAST_HOST_BYTES if parallel.offload_activations else None
    set_recompute(packed.model, parallel.recompute, host_from_bytes=host_from_bytes)
    packed.host_from_bytes = host_from_bytes
    norms = tile_norms(packed.model, parallel.tile_tokens) if parallel.tile_tokens else 0
    tiles = count_of(_tiles(config), "tile")
    tiled = f"; {norms} norms in tiles of {parallel.tile_tokens:,} tokens, experts in {tiles} per row"
    where = ", kept in host memory" if host_from_bytes else ""
    return f"activations: recompute {parallel.recompute}{where}" + (tiled if parallel.tile_tokens else "")


def engine_options(config: RunConfig) -> EngineOptions:
    """Return the engine's options; the loop sets the number of micro-batches, because stages and last steps differ."""
    optim = config.optim
    return EngineOptions(
        clip_norm=optim.clip_norm,
        dtype=config.model.dtype,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        moments=optim.moments,
        offload=optim.offload,
        extra=config.engine.extra,
    )


def make_balance(config: RunConfig, base: Family, device: torch.device) -> Balance | None:
    """Make the balance loss and load statistics of the sparse layers; None for a dense base."""
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
    """Make the ranks of this group share rows from now on; None: each rank has complete rows."""
    packed.sequence = group
    if balance is not None:
        balance.share_rows(group.ranks if group else None)


def context_lines(
    context: Extension | None, base: Family, corpora: Iterable[Corpus], renderer: Renderer, data: DataConfig
) -> list[str]:
    """Say whether the largest position in the data needs a longer context, and how to serve the trained model."""
    native = base.text.rope.original_max_position_embeddings or base.text.max_position_embeddings
    cache = Path(data.cache_dir) if data.cache_dir else None
    reaches = (reach(corpus, renderer, enough=native, cache_dir=cache) for corpus in corpora)
    farthest = max(reaches, key=lambda reach_of_corpus: reach_of_corpus.positions)
    lines = need_lines(base, context, largest=farthest.positions, exact=farthest.exact, sample=farthest.sample)
    return [*lines, *serving_lines(base, context)]
