"""The plan of quantised weights: the bytes that loading keeps, the bits that the search proposes, the page."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune.architecture.trained import frozen_tensors
from finetune.config import QuantiseConfig, RunConfig
from finetune.files.basefiles import open_base
from finetune.files.hubconfig import read_family
from finetune.files.tiny import TinyModel, write_tiny
from finetune.model.build import build
from finetune.model.empty import ModelOptions, bits_of
from finetune.model.weights import load_weights
from finetune.planner.fit import fit
from finetune.planner.gpus import cluster
from finetune.planner.plan import plan
from finetune.planner.time import Assumed
from finetune.settings.checks import base_family, require
from finetune.settings.recipes import load_recipe
from launchers.cli import main
from moe.parallel import LayerOptions


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    write_tiny(folder, TinyModel())
    return folder


@pytest.mark.parametrize("experts", ["none", "int8", "nf4"])
@pytest.mark.parametrize("dense", ["none", "nf4"])
def test_the_planned_bytes_are_those_that_loading_keeps(base: Path, experts, dense) -> None:
    quantise = QuantiseConfig(experts=experts, dense=dense)
    layer = LayerOptions(bits=bits_of(experts))
    empty = build(base, ModelOptions(layer=layer, dense_bits=bits_of(dense), dtype=torch.bfloat16))
    held = load_weights(empty, open_base(base, empty.expected)).bytes_held
    tables = sum(buffer.nbytes for name, buffer in empty.module.named_buffers() if "inv_freq" in name)
    tensors = frozen_tensors(read_family(base), RunConfig().adapters, ep=1, quantise=quantise)
    assert held - tables == sum(tensor.elements * (1 if tensor.packed else 2) for tensor in tensors)


def planned(words: list[str], gpu: str, *, gpus: int = 1):
    config, problems = load_recipe("qwen3-vl-30b-a3b-lora", ["data.packs_per_step=8", "parallel.ep=1", *words])
    require(config, problems, ranks=gpus)
    return plan(config, base_family(config), cluster(gpu, gpus=gpus, per_node=None, price=None))


def test_bits_decide_the_bytes_of_experts() -> None:
    """28,991,029,248 weights of experts: 58 GB in bfloat16, 8.1 bits a weight in int8, 4.2 in nf4."""
    weights = 28_991_029_248
    for bits, most in (("none", 16), ("int8", 8.1), ("nf4", 4.2)):
        words = [f"model.quantise.experts={bits}", "adapters.experts.mode=frozen"]
        for resident in ("frozen", "none"):
            memory = planned([*words, f"parallel.resident={resident}"], "h200-141gb").memory.always
            way = "resident" if resident == "frozen" else "partitioned"
            assert 0.98 * most <= 8 * memory[f"expert shard, {way}"] / weights <= most
        unpacked = 2 * 128 * 3 * 768 * 2048
        assert memory.get("unpacked weights of a layer", 0) == (0 if bits == "none" else unpacked)


def test_the_search_quantises_only_when_nothing_fits_otherwise() -> None:
    config, _ = load_recipe("qwen3-vl-30b-a3b-lora", ["data.packs_per_step=8", "data.tokens_per_pack=4096"])
    config = replace(config, adapters=replace(config.adapters, experts=replace(config.adapters.experts, mode="frozen")))
    base, proposed = base_family(config), {}
    for gpu in ("h200-141gb", "l40s-48gb", "rtx4090-24gb"):
        best = fit(config, base, cluster(gpu, gpus=1, per_node=None, price=None), assumed=Assumed()).best
        assert best is not None
        assert best.plan.fits
        proposed[gpu] = {key: bits for key, bits in best.changes.items() if key.startswith("model.quantise.")}
    assert proposed == {
        "h200-141gb": {},
        "l40s-48gb": {"model.quantise.experts": "int8"},
        "rtx4090-24gb": {"model.quantise.experts": "nf4", "model.quantise.dense": "nf4"},
    }


def test_the_page_says_what_is_quantised_and_that_experts_run_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["qwen3-vl-30b-a3b-lora", "data.packs_per_step=8", "parallel.ep=1", "model.quantise.experts=nf4"]
    line = "compute capability 8.9: torch has no grouped kernel below 9, so experts run one by one"
    for gpu, is_said in (("l40s-48gb", True), ("b300-288gb", False)):
        main(["plan", *words, "--gpus", "1", "--gpu", gpu])
        out = capsys.readouterr().out
        assert "quantised: experts in nf4" in out
        assert (line in out) == is_said
        main(["plan", *words, "--gpus", "1", "--gpu", gpu, "--json"])
        assert json.loads(capsys.readouterr().out)["quantised"] == {"experts": "nf4", "dense": "none"}


WRONG = {
    "full": (
        ["model.quantise.experts=nf4", "adapters.experts.mode=full"],
        r"model.quantise.experts = 'nf4': adapters.experts.mode is full, and weights that train cannot be quantised",
    ),
    "full attention": (
        ["model.quantise.dense=int8", "adapters.attention.mode=full"],
        r"model.quantise.dense = 'int8': adapters.attention.mode is full",
    ),
    "no adapter": (
        ["model.quantise.experts=int8", "adapters.attention.mode=full", "adapters.experts.mode=frozen"],
        r"model.quantise.experts = 'int8': a run without a part in mode lora writes a complete model",
    ),
    "dense base": (
        ["model.family=qwen3-vl-8b", "model.quantise.experts=int8", "adapters.experts.mode=frozen"],
        r"model.quantise.experts = 'int8': qwen3-vl-8b is dense: it has no experts. Set model.quantise.dense instead",
    ),
    "unknown": (
        ["model.quantise.experts=fp4"],
        r"model.quantise.experts = 'fp4' \(command line\): it must be one of none, int8, nf4",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_quantised_is_said_before_the_start(case: str) -> None:
    words, message = WRONG[case]
    config, problems = load_recipe("qwen3-vl-30b-a3b-lora", words)
    with pytest.raises(ValueError, match=message):
        require(config, problems, ranks=8)
