"""One expert block with LoRA, built twice from the same values: ours, and PEFT's ParamWrapper on transformers' experts.

Both take tokens, the router's choice and its scores, and return the weighted sum; the router itself is not included.
Suffixes: T tokens, D hidden, F expert hidden, E experts, K top-k.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

from benchmarks.harness.measure import Side
from benchmarks.harness.outputs import same_tensors
from moe.dispatch import combine, dispatch, route
from moe.experts import ExpertLora, GroupedExperts
from moe.packing import pack_lora, unpack_lora

RELATIVE = 1e-5
"""Largest error of outputs and gradients, relative to each tensor's largest value, in float32."""
_PEFT_KEYS = {"gate_up": "experts.base_layer.lora_{}.default.weight", "down": "experts.lora_{}.default.weight"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The block's sizes."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int = 8
    r: int = 8

    @property
    def smaller_stack_bytes(self) -> int:
        """Size of the smaller of the two frozen expert stacks, in float32."""
        return 4 * self.experts * self.hidden * self.intermediate


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of a step, and the gradient of its output."""

    x_TD: Tensor
    topk_TK: Tensor
    scores_TK: Tensor
    grad_TD: Tensor

    def leaves(self) -> list[Tensor]:
        """Return the tensors that exist before the step."""
        return [self.x_TD, self.topk_TK, self.scores_TK, self.grad_TD]


class Pair:
    """Our experts and PEFT's, with the same frozen weights and the same factors."""

    def __init__(
        self,
        shape: Shape,
        *,
        implementation: str = "grouped_mm",
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        self.shape = shape
        self.device, self.dtype = torch.device(device), dtype
        self.experts = GroupedExperts(
            name="block",
            num_experts=shape.experts,
            local_experts=range(shape.experts),
            hidden=shape.hidden,
            intermediate=shape.intermediate,
            mode="lora",
            lora=ExpertLora(r=shape.r, alpha=2.0 * shape.r),
            resident=True,
            seed=0,
            dtype=dtype,
        ).to(self.device)
        self.experts.gate_up.normal_(std=shape.hidden**-0.5)
        self.experts.down.normal_(std=shape.intermediate**-0.5)
        self.experts.init_lora(b_std=0.1)  # with B = 0, the gradients of A would be zero
        self.peer = _peft_block(self.experts, shape, implementation)
        self.peer_name = f"PEFT ParamWrapper, {implementation}"

    def inputs(self, tokens: int) -> Inputs:
        """Return random tokens and the nearly even routing of random weights."""
        generator = torch.Generator().manual_seed(tokens)
        probs_TE = torch.randn(tokens, self.shape.experts, generator=generator).softmax(-1)
        scores_TK, topk_TK = probs_TE.topk(self.shape.top_k)
        x_TD, grad_TD = torch.randn(2, tokens, self.shape.hidden, generator=generator).to(self.device, self.dtype)
        scores_TK = (scores_TK / scores_TK.sum(-1, keepdim=True)).to(self.device, self.dtype)
        return Inputs(
            x_TD=x_TD.requires_grad_(),
            topk_TK=topk_TK.to(self.device),
            scores_TK=scores_TK.requires_grad_(),
            grad_TD=grad_TD,
        )

    def config(self, tokens: int) -> dict[str, object]:
        """Return the shapes for a record."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {**asdict(self.shape), "tokens": tokens, "dtype": dtype, "threads": torch.get_num_threads()}

    def forward_ours(self, inputs: Inputs) -> Tensor:
        """Return y_TD from our route, dispatch, experts and combine."""
        routing = route(inputs.topk_TK, num_experts=self.shape.experts, group=None, ep_size=1)
        return combine(self.experts(dispatch(inputs.x_TD, routing), routing.counts_L), inputs.scores_TK, routing)

    def forward_peer(self, inputs: Inputs) -> Tensor:
        """Return y_TD from PEFT."""
        y_TD: Tensor = self.peer.experts(inputs.x_TD, inputs.topk_TK, inputs.scores_TK)
        return y_TD

    def experts_of_peer(self) -> Qwen3VLMoeTextExperts:
        """Return transformers' experts inside PEFT's wrappers, which hold the frozen weights."""
        return self.peer.experts.base_layer.base_layer

    def sides(self, inputs: Inputs) -> tuple[Side, Side]:
        """Return one step for each side: forward and backward with all gradients, which have our names."""
        return (
            Side(name="moetune", run=lambda: self._step(self.forward_ours, inputs, self._our_gradients)),
            Side(name=self.peer_name, run=lambda: self._step(self.forward_peer, inputs, self._peer_gradients)),
        )

    def forget(self, inputs: Inputs) -> None:
        """Drop all gradients."""
        for tensor in (inputs.x_TD, inputs.scores_TK, *self.experts.parameters(), *self.peer.parameters()):
            tensor.grad = None

    def _step(
        self, forward: Callable[[Inputs], Tensor], inputs: Inputs, gradients: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        self.forget(inputs)
        y_TD = forward(inputs)
        torch.autograd.backward(y_TD, inputs.grad_TD)
        assert inputs.x_TD.grad is not None
        assert inputs.scores_TK.grad is not None
        return {"y": y_TD.detach(), "dx": inputs.x_TD.grad, "dscores": inputs.scores_TK.grad, **gradients()}

    def _our_gradients(self) -> dict[str, Tensor]:
        return {f"d{key}": _gradient(factor) for key, factor in self.experts.named_parameters()}

    def _peer_gradients(self) -> dict[str, Tensor]:
        gradients: dict[str, Tensor] = {}
        for projection, key in _PEFT_KEYS.items():
            packed = [_gradient(self.peer.get_parameter(key.format(letter))) for letter in "AB"]
            a, b = unpack_lora(projection, *packed, experts=self.shape.experts)
            gradients |= {f"d{projection}_lora_A": a, f"d{projection}_lora_B": b}
        return gradients


def same_step(ours: dict[str, Tensor], peer: dict[str, Tensor]) -> None:
    """Raise if the output or any gradient differs from the peer's."""
    same_tensors(ours, peer, relative=RELATIVE)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@torch.no_grad()
def _peft_block(ours: GroupedExperts, shape: Shape, implementation: str) -> Any:
    config = Qwen3VLMoeTextConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = implementation
    experts = Qwen3VLMoeTextExperts(config)
    # separate copies, because ours may have gaps in memory
    experts.gate_up_proj = nn.Parameter(ours.gate_up.clone(memory_format=torch.contiguous_format))
    experts.down_proj = nn.Parameter(ours.down.clone(memory_format=torch.contiguous_format))
    block = nn.Module()
    block.experts = experts
    assert ours.lora is not None
    options = LoraConfig(
        r=ours.lora.r,
        lora_alpha=ours.lora.alpha,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    adapted = inject_adapter_in_model(options, block)
    for projection, key in _PEFT_KEYS.items():
        factors = (ours.get_parameter(f"{projection}_lora_{letter}") for letter in "AB")
        for letter, packed in zip("AB", pack_lora(*factors), strict=True):
            adapted.get_parameter(key.format(letter)).copy_(packed)
    return adapted
