"""Time one decoder layer of the 30B model by purpose of the kernels: forward, recompute and backward.

With 16 local experts, each token still chooses 8: one of eight ranks receives as many rows as it sends, so this is
its work on a layer, without the exchange itself.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Profiled, profiled, synchronise
from benchmarks.gpu.drawn import drawn_base
from benchmarks.gpu.material import write_sides
from benchmarks.gpu.sizes import Sizes
from benchmarks.harness.figure import Figure, Peer
from benchmarks.harness.measure import Side, spread, take_turns
from finetune.architecture.families import Family
from finetune.files.hubconfig import read_family
from finetune.model.build import build
from finetune.model.recompute import set_recompute
from finetune.model.weights import load_weights
from finetune.planner.activations import Recompute, Rows
from finetune.planner.gpus import Gpu, gpu_like
from finetune.planner.layer import decoder_layer
from finetune.planner.operations import Kind, spent
from finetune.ranks.engine import engine_device, start_distributed
from finetune.settings.recipes import load_recipe
from finetune.training.setup import make_balance, model_options

RECOMPUTE: tuple[Recompute, ...] = ("layer", "selective")
WORDS = ("adapters.attention.mode=lora", "adapters.experts.mode=lora", "model.attention=auto")


def run(sizes: Sizes) -> Iterator[Figure]:
    """Yield wall time, device time and device time by kind for each case; one sample fills the row."""
    start_distributed()
    for experts in sizes.local_experts:
        with tempfile.TemporaryDirectory() as name:
            base = write_sides(Path(name) / "base", replace(sizes.model, layers=1, experts=experts, vocabulary=None))
            for tokens in sizes.layer_tokens:
                for recompute in RECOMPUTE:
                    side = _side(base, tokens, recompute)
                    (seconds,) = take_turns([side], rounds=2 * sizes.rounds, warmup=2, synchronise=synchronise)
                    gpu = gpu_like(sizes.gpu)
                    roofline_s = roofline(read_family(base), gpu, tokens, recompute) if gpu is not None else {}
                    config = {
                        "tokens": tokens,
                        "local_experts": experts,
                        "recompute": recompute,
                        "dtype": "bfloat16",
                        "hidden": sizes.model.hidden,
                        "gpu": sizes.gpu,
                        "samples": 1,
                    }
                    yield from _figures(config, min(seconds), spread(seconds), len(seconds), profiled(side), roofline_s)


def _side(base: Path, tokens: int, recompute: Recompute) -> Side:
    """Build the layer as training calls it, with hidden states that require gradients."""
    device, family = engine_device(), read_family(base)
    config = load_recipe("", [f"model.path={base}", f"data.tokens_per_pack={tokens}", *WORDS])[0]
    balance = make_balance(config, family, device)
    assert balance is not None
    empty = build(base, model_options(config, family, device, print), balance=balance)
    files = drawn_base(base, empty.expected, device)
    load_weights(empty, files)
    set_recompute(empty.module, recompute)
    empty.module.train()
    text: Any = empty.module.get_submodule("model.language_model")
    torch.manual_seed(0)
    x = torch.randn(1, tokens, family.text.hidden_size, device=device, dtype=torch.bfloat16).requires_grad_()
    gradient = torch.randn_like(x)
    places = torch.arange(tokens, device=device).expand(3, 1, -1)
    turned = text.rotary_emb(x.detach(), places)
    cuts = torch.tensor([0, tokens], device=device, dtype=torch.int32)
    borders = {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts, "max_length_q": tokens, "max_length_k": tokens}
    valid = torch.ones(tokens, device=device, dtype=torch.bool)

    def step() -> Tensor:
        for tensor in (x, *empty.module.parameters()):
            tensor.grad = None
        balance.start_step(tokens)
        balance.start_micro_batch(valid)
        out = text.layers[0](x, attention_mask=None, position_embeddings=turned, **borders)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(gradient)
        assert x.grad is not None
        return x.grad

    return Side(name="one layer", run=step)


def roofline(base: Family, gpu: Gpu, tokens: int, recompute: Recompute) -> dict[str, float]:
    """Return the planner's seconds by kind for a GPU, with one sample that fills the row and an even load."""
    assert base.text.experts is not None
    arriving = tokens * base.text.experts.num_experts_per_tok
    rows = Rows(tokens=tokens, supervised=0, patches=0, arriving=arriving, itemsize=2)
    adapters = load_recipe("", WORDS)[0].adapters
    made = decoder_layer(base, adapters, rows, recompute, squares=tokens**2, sparse=True)
    return spent([(op, 1) for op in made.every], gpu, local_experts=base.text.experts.num_experts).kinds


def _figures(
    config: dict[str, Any], wall: float, apart_s: float, rounds: int, profile: Profiled, roofline_s: dict[str, float]
) -> Iterator[Figure]:
    what = f"{config['local_experts']} local experts, {config['tokens']} tokens, recompute {config['recompute']}"
    kernels = {name[:100]: round(1e3 * seconds, 4) for name, seconds in list(profile.kernels.items())[:20]}
    yield Figure(
        f"one layer, {what}",
        1e3 * wall,
        "ms",
        config=config | {"kernels_ms": kernels},
        n=rounds,
        spread={"ours": apart_s},
    )
    kinds: dict[str, float] = defaultdict(float)
    for name, seconds in profile.operations.items():
        kinds[kind(name)] += seconds
    for name, seconds in [
        ("device", profile.device),
        ("host", profile.host),
        *sorted(kinds.items(), key=lambda item: -item[1]),
    ]:
        beside = sum(roofline_s.values()) if name == "device" and roofline_s else roofline_s.get(name)
        yield Figure(
            f"{name}, one layer, {what}",
            1e3 * seconds,
            "ms",
            config=config,
            peer=None if beside is None else Peer("roofline", 1e3 * beside),
        )


def kind(operation: str) -> Kind:
    """Return the planner's kind of a torch operation."""
    name = operation.rpartition("::")[2]
    if "grouped_mm" in name:
        return "grouped_mm"
    if name in ("mm", "addmm", "convolution"):
        return "dense mm"
    if "attn" in name or "attention" in name:
        return "attention"
    if name in ("index_select", "bmm", "index", "index_put_"):
        return "row permutes"
    if name in ("topk", "sort", "searchsorted", "scatter_", "cumsum", "arange", "diff", "gather", "bincount"):
        return "routing"
    return "pointwise"
