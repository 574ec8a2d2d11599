"""moe.dispatch: deepep, through DeepSpeed's transport and a stand-in for the package deep_ep (see gloo_deep_ep)."""

import sys
from typing import Any
from unittest.mock import patch

import gloo_deep_ep
import torch
from ranks import run_ranks
from tiny_moe import LORA, start_factors, vl_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finetune.ranks.engine import start_distributed
from moe.parallel import ExpertParallelMoe, LayerOptions, replace_moe_blocks
from moe.recompute import contexts
from moe.router import RouterOptions

TOKENS = 50


def layer_of(dispatch: Any) -> ExpertParallelMoe:
    options = LayerOptions(
        experts="lora", lora=LORA, router=RouterOptions(mode="full"), dispatch=dispatch, deepep_max_tokens=TOKENS
    )
    layer = replace_moe_blocks(vl_model().bfloat16(), ep_size=2, options=options)[0]
    start_factors(layer)
    return layer


def step(layer: ExpertParallelMoe, rank: int, recompute: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(1, TOKENS, 48, generator=generator).bfloat16().requires_grad_()
    keep = {"use_reentrant": False, "context_fn": contexts("layer")}
    y = checkpoint(layer, x, **keep) if recompute else layer(x)
    y.backward(torch.randn(y.shape, generator=generator).bfloat16())
    found = {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    return {name: value.float().clone() for name, value in found.items()}


def both(rank: int, world: int) -> Any:
    start_distributed()
    wanted = step(layer_of("all_to_all"), rank, False)
    # only the check at construction sees a device; the layer's barrier before its first buffer would need a real one
    with (
        patch.dict(sys.modules, {"deep_ep": gloo_deep_ep}),
        patch("torch.cuda.is_available", return_value=True),
        patch("importlib.util.find_spec", return_value=object()),
    ):
        layer = layer_of("deepep")
    with patch.dict(sys.modules, {"deep_ep": gloo_deep_ep}), patch("deepspeed.comm.barrier"):
        found = [step(layer, rank, recompute) for recompute in (False, True)]
    sizes = layer._deepep_exchange.buffer.sizes
    return wanted, found, sizes


def test_deepep_computes_what_the_all_to_all_computes() -> None:
    for wanted, found, sizes in run_ranks(both, 2):
        assert (sizes["num_max_tokens_per_rank"], sizes["hidden"], sizes["num_topk"]) == (TOKENS, 48, 2)
        for result in found:
            assert result.keys() == wanted.keys()
            for name, value in wanted.items():
                assert value.norm() > 0
                assert (result[name] - value).norm() <= 0.02 * value.norm(), name
