"""The expert-parallel MoE layer, and how it is put into a transformers model: before the engine starts, even on meta.

The layer subclasses DeepSpeed's so that the engine recognises it, but does not use its constructor: the router, the
experts and the exchange of rows are ours. The parameters of its experts are tagged for the expert-data group, over
which ZeRO-3 then partitions them and reduces their gradients.
"""

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint.autoep_affine import legacy_uniform_autoep_placement_descriptor
from deepspeed.module_inject import auto_ep_comm
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, RouterOutput
from deepspeed.utils import groups
from torch import Tensor, nn

from moe import dispatch as all_to_all
from moe.experts import ExpertLora, GroupedExperts
from moe.kernels.linear import Workspace
from moe.kernels.packed import Bits
from moe.names import LAYERS
from moe.placement import check_ep, expert_range
from moe.recompute import checkpointed, contexts, kept
from moe.router import Router, RouterOptions

BalanceCall = Callable[[int, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(layer, logits_TE, probs_TE, topk_TK, base_topk_TK) -> probs_TE"""


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Options of computing and training for every replaced block."""

    experts: Literal["frozen", "lora", "full"] = "frozen"
    lora: ExpertLora | None = None
    router: RouterOptions = field(default_factory=RouterOptions)
    resident: bool = True
    bits: Bits | None = None
    """The form of frozen experts; None: as the model computes."""
    dispatch: Literal["all_to_all", "deepep"] = "all_to_all"
    deepep_max_tokens: int = 0
    """Most tokens that a rank may have in one micro-batch; DeepEP sizes its buffer by it."""
    tiles: int = 1
    """Number of parts of a row's tokens that go through the experts one by one; backward computes each again.

    It must be equal on all ranks of an expert-parallel group, however many tokens each has, because they exchange rows.
    """
    seed: int = 0


class ExpertParallelMoe(AutoEPMoELayer):  # type: ignore[misc]  # deepspeed is untyped
    """A sparse block whose experts are spread over the ranks of an expert-parallel group.

    Every rank of the group must call it equally often and in the same order. It takes and returns [..., D].
    """

    def __init__(
        self,
        *,
        name: str,
        index: int,
        config: Any,
        ep_size: int,
        options: LayerOptions,
        balance: BalanceCall | None,
        dtype: torch.dtype,
        device: torch.device,
        workspace: Workspace | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not the parent's, which would build a router and experts of its own
        self.name = name
        self.index = index
        self.options = options
        self.balance = balance
        self.num_experts, self.hidden_size = config.num_experts, config.hidden_size
        self.top_k = config.num_experts_per_tok
        self.normalise = getattr(config, "norm_topk_prob", True)  # Qwen3-VL-MoE always normalises and has no such key
        self._place(ep_size)
        common: dict[str, Any] = {"resident": options.resident, "seed": options.seed, "dtype": dtype, "device": device}
        self.gate = Router(
            name=f"{name}.gate", num_experts=self.num_experts, hidden=self.hidden_size, options=options.router, **common
        )
        self.experts = GroupedExperts(
            name=f"{name}.experts",
            num_experts=self.num_experts,
            local_experts=self.local_experts,
            hidden=self.hidden_size,
            intermediate=config.moe_intermediate_size,
            mode=options.experts,
            lora=options.lora,
            bits=options.bits,
            workspace=workspace,
            **common,
        )
        group = self.ep_group_name
        _tag(
            self.experts,
            allreduce=False,
            group_name=group,
            ds_zero_placement_family="autoep_expert",
            ds_zero_partition_group_name=group,
        )
        _tag(self.gate, ds_zero_placement_family="replicated")

    def _place(self, ep_size: int) -> None:
        """Find this rank's experts and groups, and set the attributes that the engine and the DeepEP route read."""
        self.ep_size, self.ep_group_name = ep_size, f"ep_size_{ep_size}"
        self.ep_rank = dist.get_rank() % ep_size if dist.is_initialized() else 0
        self.local_experts = expert_range(num_experts=self.num_experts, ep=ep_size, ep_rank=self.ep_rank)
        self.num_local_experts = len(self.local_experts)
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            self.num_experts, self.num_local_experts, ep_size
        )
        self.ep_group = groups._get_expert_parallel_group(self.ep_group_name) if dist.is_initialized() else None
        if self.options.dispatch == "deepep":
            self.score_apply, self.row_weighting_impl = "post", "eager"
            self.comm_num_sm, self.comm_qp_margin = auto_ep_comm.DEFAULT_COMM_SMS, 4
            self.comm_max_tokens_per_rank = self.options.deepep_max_tokens
            self._deepep_replay = auto_ep_comm.DeepEPCheckpointReplay()
        self._deepep_exchange = None

    def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
        """Do nothing: the groups existed before the layer, so the engine need not make any."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Route the tokens, send rows to their experts, compute, send them back, and sum with the router's scores."""
        x_TD = hidden_states.reshape(-1, self.hidden_size)
        logits_TE, base_topk_TK = self.gate(x_TD, self.top_k)
        probs_TE = logits_TE.softmax(-1, dtype=torch.float32)
        topk_TK = kept("topk", lambda: probs_TE.detach().topk(self.top_k).indices)
        if self.balance is not None:
            probs_TE = self.balance(self.index, logits_TE, probs_TE, topk_TK, base_topk_TK)
        scores_TK = probs_TE.gather(1, topk_TK)
        if self.normalise:
            scores_TK = scores_TK / scores_TK.sum(-1, keepdim=True)
        if self.options.dispatch == "deepep":
            y_TD: Tensor = self._deepep_route(x_TD, RouterOutput(scores_TK, topk_TK, None))
        else:
            y_TD = self._by_tiles(x_TD, topk_TK, scores_TK.to(x_TD.dtype))
        return y_TD.view_as(hidden_states)

    def _by_tiles(self, x_TD: Tensor, topk_TK: Tensor, scores_TK: Tensor) -> Tensor:
        """Compute all tokens at once, or tile by tile, so that only one tile's routed rows exist at a time."""
        if self.options.tiles == 1:
            return self._exchange(x_TD, topk_TK, scores_TK)
        tiles = zip(*(tensor.tensor_split(self.options.tiles) for tensor in (x_TD, topk_TK, scores_TK)), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([self._exchange(*tile) for tile in tiles])
        again, lora = contexts("layer"), self.options.lora
        draws = lora is not None and lora.dropout > 0
        return torch.cat([checkpointed(self._exchange, *tile, context_fn=again, draws=draws) for tile in tiles])

    def _exchange(self, x_TD: Tensor, topk_TK: Tensor, scores_TK: Tensor) -> Tensor:
        route = all_to_all.route(topk_TK, num_experts=self.num_experts, group=self.ep_group, ep_size=self.ep_size)
        y_RD = self.experts(all_to_all.dispatch(x_TD, route), route.counts_L)
        return all_to_all.combine(y_RD, scores_TK, route)

    @torch.no_grad()
    def load(self, block: Any) -> None:
        """Copy our experts from a transformers block, whose fused tensors have our orientation, and its router."""
        mine = slice(self.local_experts.start, self.local_experts.stop)
        for key, theirs in (("gate_up", block.experts.gate_up_proj), ("down", block.experts.down_proj)):
            packing = self.experts.packings.get(key)
            values = theirs[mine] if packing is None else packing.pack(theirs[mine], name=f"{self.name}.experts.{key}")
            getattr(self.experts, key).copy_(values)
        self.gate.weight.copy_(block.gate.weight)
        self.gate.keep_base()


def _tag(module: nn.Module, **tags: Any) -> None:
    """Set attributes on the parameters from which the engine learns which ranks hold copies of them."""
    for parameter in module.parameters():
        for key, value in tags.items():
            setattr(parameter, key, value)


def replace_moe_blocks(
    model: Any,
    *,
    ep_size: int,
    options: LayerOptions,
    balance: BalanceCall | None = None,
    workspace: Workspace | None = None,
) -> list[ExpertParallelMoe]:
    """Replace each sparse block of a Qwen3-VL-MoE or Qwen3-MoE model, on meta or not; every rank must call this.

    Return the layers in order; their names are unchanged (`...layers.N.mlp`). On meta only shapes and tags are made:
    the caller loads the weights, then calls `layer.experts.init_lora()`, `layer.gate.init_lora()` and
    `layer.gate.keep_base()`. Otherwise the weights are copied and the adapters initialised.
    """
    blocks = _find_blocks(model)
    config = model.config.get_text_config()
    _check_layout(config, ep_size, options, dtype=next(iter(blocks.values())).gate.weight.dtype)
    if dist.is_initialized():
        assert deepspeed.comm.is_initialized(), "the engine must know the process group: call start_distributed first"
        groups._create_expert_and_data_parallel(ep_size)
    scope = auto_ep_comm.new_exchange_scope()  # the layers of one model share a DeepEP buffer; two models do not
    workspace = workspace or Workspace()
    layers = []
    for index, (name, block) in enumerate(blocks.items()):
        weight = block.gate.weight
        layer = ExpertParallelMoe(
            name=name,
            index=index,
            config=config,
            ep_size=ep_size,
            options=options,
            balance=balance,
            workspace=workspace,
            dtype=weight.dtype,
            device=weight.device,
        ).train(block.training)
        if not weight.is_meta:
            layer.load(block)
        layer.deepep_scope = scope
        model.set_submodule(name, layer)
        layers.append(layer)
    return layers


def describe(layers: Sequence[ExpertParallelMoe]) -> str:
    """Describe the replaced blocks in one line: their size, and how they compute and train."""
    layer = layers[0]
    lora = f" r {layer.options.lora.r}" if layer.options.lora is not None else ""
    packed = f" beside {layer.options.bits}" if layer.options.bits else ""
    frozen = "resident" if layer.options.resident else "partitioned by ZeRO-3"
    return (
        f"{len(layers)} sparse blocks: {layer.num_experts} experts, {layer.num_local_experts} per rank "
        f"(ep {layer.ep_size}), {layer.options.experts}{lora}{packed}, router {layer.options.router.mode}, "
        f"frozen weights {frozen}, rows by {layer.options.dispatch}, grouped_mm"
    )


def _find_blocks(model: Any) -> dict[str, Any]:
    """Return the sparse blocks by name, exactly where the config says they are."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in LAYERS:
        raise ValueError(
            f"model type {kind!r} has no expert-parallel layer here; it must be one of {', '.join(sorted(LAYERS))}. "
            f"A model without experts needs none: leave its blocks as they are"
        )
    config = model.config.get_text_config()
    expected = [f"{LAYERS[kind]}{number}.mlp" for number in sparse_layers(config)]
    sparse = {n: m for n, m in model.named_modules() if hasattr(m, "experts") and hasattr(m, "gate")}
    present = [name for name, module in sparse.items() if not isinstance(module, ExpertParallelMoe)]
    if not expected or present != expected:
        replaced = [name for name, module in sparse.items() if isinstance(module, ExpertParallelMoe)]
        raise ValueError(
            f"a {kind} model with this config has {len(expected)} sparse blocks ({_some(expected)}), but "
            f"{len(present)} were found ({_some(present)}), and {len(replaced)} are already replaced; "
            f"check num_experts, decoder_sparse_step and mlp_only_layers"
        )
    return {name: sparse[name] for name in expected}


def sparse_layers(config: Any) -> list[int]:
    """Return the numbers of the decoder layers that have experts according to the text config."""
    step, dense = config.decoder_sparse_step, set(config.mlp_only_layers or ())
    numbers = range(config.num_hidden_layers) if config.num_experts > 0 else ()
    return [number for number in numbers if number not in dense and (number + 1) % step == 0]


def _check_layout(config: Any, ep_size: int, options: LayerOptions, *, dtype: torch.dtype) -> None:
    world = dist.get_world_size() if dist.is_initialized() else 1
    check_ep(num_experts=config.num_experts, world_size=world, ep=ep_size)
    if config.hidden_act != "silu":
        raise ValueError(f"experts compute SwiGLU, but the config's hidden_act is {config.hidden_act!r}, not 'silu'")
    if options.tiles > 1 and options.dispatch == "deepep":
        raise ValueError(
            "parallel.tile_tokens exchanges rows tile by tile, but moe.dispatch: deepep exchanges all rows at once. "
            "Use moe.dispatch: all_to_all, or parallel.tile_tokens: 0"
        )
    if options.dispatch not in ("all_to_all", "deepep"):
        raise ValueError(f"moe.dispatch must be one of all_to_all, deepep, got {options.dispatch!r}")
    if options.dispatch == "deepep":
        _check_deepep(ep_size, options.deepep_max_tokens, dtype)


def _check_deepep(ep_size: int, max_tokens: int, dtype: torch.dtype) -> None:
    """Raise ValueError with every reason why DeepEP cannot work here."""
    missing = []
    if importlib.util.find_spec("deep_ep") is None:
        missing.append("the package deep_ep is not installed")
    if not torch.cuda.is_available():
        missing.append("no CUDA device is visible")
    if ep_size == 1:
        missing.append("parallel.ep is 1, so there is nothing to exchange")
    if dtype != torch.bfloat16:
        missing.append(f"the model is {str(dtype).removeprefix('torch.')}, but DeepEP moves bfloat16 only")
    if max_tokens < 1:
        missing.append("the largest number of tokens in a micro-batch is not known (data.tokens_per_pack)")
    if missing:
        raise ValueError(f"moe.dispatch: deepep cannot be used: {'; '.join(missing)}. Use moe.dispatch: all_to_all")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]]) or "none"
