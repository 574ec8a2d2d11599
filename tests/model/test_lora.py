"""Trainable parameters by part: the section's checks, full-path targets, start values, the printed table."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from base_folders import dense_model, write_base
from peft.tuners.lora import LoraLayer
from tiny_moe import media_batch, vl_model

from finetune.architecture.families import family
from finetune.architecture.parts import NO_LORA, PARTS
from finetune.architecture.shapes import part_of
from finetune.architecture.trained import trained_tensors
from finetune.config import (
    AdaptersConfig,
    DensePartConfig,
    ExpertPartConfig,
    ModelConfig,
    PartConfig,
    RouterPartConfig,
    RunConfig,
)
from finetune.files.basefiles import open_base
from finetune.files.hubconfig import read_family
from finetune.model.build import build
from finetune.model.empty import EmptyModel, ModelOptions
from finetune.model.lora import inject, pattern, table_lines, trainable_table, with_adapters
from finetune.model.weights import load_weights
from finetune.settings.check_adapters import adapter_problems
from finetune.settings.checks import cross_check
from moe.config import MoeConfig
from moe.experts import ExpertLora as Lora
from moe.parallel import LayerOptions

OFF = AdaptersConfig(attention=DensePartConfig())
LORA = DensePartConfig(mode="lora", r=8, alpha=12.0)
EVERY_LORA = AdaptersConfig(
    attention=LORA,
    experts=ExpertPartConfig(mode="lora"),
    router=RouterPartConfig(mode="lora", r=3),
    vision_blocks=DensePartConfig(mode="lora", r=4, alpha=8.0, rslora=True, dropout=0.1),
    merger=LORA,
    deepstack_mergers=LORA,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    models = {"moe": vl_model(layers=2), "dense": dense_model(), "tied": dense_model(tied=True)}
    return {name: write_base(model, tmp_path_factory.mktemp("base") / name) for name, model in models.items()}


def made(folder: Path, config: AdaptersConfig, **more: Any) -> EmptyModel:
    options = ModelOptions(dtype=torch.float32, layer=LayerOptions(seed=3))
    return build(folder, with_adapters(config, replace(options, **more)))


@pytest.mark.parametrize("base", ["moe", "dense"])
def test_a_zero_b_gives_exactly_the_logits_of_the_base(folders: dict[str, Path], base: str) -> None:
    lora = EVERY_LORA if base == "moe" else AdaptersConfig(attention=LORA, mlp=LORA, vision_blocks=LORA)
    found = []
    for config in (OFF, lora):
        empty = made(folders[base], config)
        load_weights(empty, open_base(folders[base], empty.expected))
        with torch.no_grad():
            found.append(empty.module.eval()(**media_batch(slice(0, 2)), use_cache=False).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize("chosen", [name for name in PARTS if name != "mlp"])
def test_only_the_chosen_part_trains(folders: dict[str, Path], chosen: str) -> None:
    modes = ["full"] if chosen in NO_LORA else ["full", "lora"]
    for mode in modes:
        kind = type(getattr(OFF, chosen))
        config = replace(OFF, **{chosen: kind(mode=mode)})
        empty = made(folders["moe"], config)
        rows = {row.part: row for row in trainable_table(empty)}
        foreseen = trained_tensors(read_family(folders["moe"]), config, ep=1)  # what `check` and `plan` say
        assert sum(tensor.elements for tensor in foreseen) == rows[chosen].trained
        assert {name: row.mode for name, row in rows.items() if row.mode != "frozen"} == {chosen: mode}
        assert sum(row.trained for row in rows.values()) == rows[chosen].trained > 0
        assert (rows[chosen].trained == rows[chosen].total) == (mode == "full")
        own = [name for name in empty.expected if part_of(name) == chosen]
        assert rows[chosen].tensors <= len(own)
        assert mode == "lora" or rows[chosen].tensors == len(own)


def test_targets_are_full_paths_and_have_the_numbers_of_their_part(folders: dict[str, Path]) -> None:
    empty = made(folders["moe"], EVERY_LORA)
    layers = {name: module for name, module in empty.module.named_modules() if isinstance(module, LoraLayer)}
    assert len(layers) == 2 * 4 + 3 * 4 + 2 + 2 * 2
    assert not any("patch_embed" in name or "norm" in name or "lm_head" in name for name in layers)
    for name, layer in layers.items():
        blocks = "visual.blocks" in name
        assert (layer.r["default"], layer.scaling["default"]) == ((4, 4.0) if blocks else (8, 1.5))
        assert getattr(layer.lora_dropout["default"], "p", 0.0) == (0.1 if blocks else 0.0)
    names = ["model.layers.3.a.7.q", "model.layers.12.a.0.q", "model.layers.0.o"]
    assert pattern(names) == r"model\.layers\.\d+\.a\.\d+\.q|model\.layers\.\d+\.o"


def test_start_values_depend_on_seed_and_name(folders: dict[str, Path]) -> None:
    def factors(seed: int) -> dict[str, torch.Tensor]:
        empty = made(folders["moe"], EVERY_LORA, layer=LayerOptions(seed=seed))
        load_weights(empty, open_base(folders["moe"], empty.expected))
        return {name: p.detach() for name, p in empty.module.named_parameters() if "lora_A" in name}

    one, same, other = factors(1), factors(1), factors(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    q, k = (one[f"model.language_model.layers.0.self_attn.{key}_proj.lora_A.default.weight"] for key in "qk")
    assert not torch.equal(q, k)
    assert 0.9 / 48**0.5 < float(q.abs().max()) <= 1 / 48**0.5


def test_the_printed_table(folders: dict[str, Path]) -> None:
    lines = table_lines(trainable_table(made(folders["moe"], EVERY_LORA)))
    assert lines[0].split() == ["family", "mode", "tensors", "trained", "of"]
    # r (in + out): q 48, 128; k and v 48, 64; o 128, 48
    assert " ".join(lines[1].split()) == f"attention lora 8 {2 * 8 * (176 + 2 * 112 + 176):,} 36,992 r 8, scale 1.5"
    assert lines[-1].split()[:4] == ["head", "frozen", "0", "0"]


@pytest.mark.parametrize(
    ("folder", "config", "text"),
    [
        ("dense", replace(OFF, experts=ExpertPartConfig(mode="lora")), r"adapters.experts.mode: lora, but .*dense"),
        ("dense", replace(OFF, router=RouterPartConfig(mode="full")), r"adapters.router.mode: full, .* no router"),
        ("moe", replace(OFF, mlp=LORA), r"LoRA on mlp: the model has no matrices of this part. Leave adapters"),
        ("moe", replace(OFF, mlp=DensePartConfig(mode="full")), r"parts to train: mlp not in this model"),
        ("tied", replace(OFF, head=PartConfig(mode="full")), r"base ties its head and its embedding"),
        ("tied", replace(OFF, embeddings=PartConfig(mode="full")), r"training either would change both"),
        ("moe", replace(OFF, patch_embed=PartConfig(mode="lora")), r"adapters.patch_embed.mode: lora: .*Conv3d"),
        ("moe", replace(OFF, norms=PartConfig(mode="lora")), r"adapters.norms.mode: lora: .*a vector"),
        ("moe", replace(OFF, head=PartConfig(mode="lora")), r"adapters.head.mode: lora: .*Use frozen or full"),
    ],
)
def test_parts_that_are_missing_or_cannot_be_adapted_are_refused(
    folders: dict[str, Path], folder: str, config: AdaptersConfig, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        made(folders[folder], config)


def test_injection_refuses_the_same_parts_as_the_section(folders: dict[str, Path]) -> None:
    empty = made(folders["moe"], OFF)
    with pytest.raises(ValueError, match=r"LoRA on embeddings: servers of this model load no adapter on the token"):
        inject(empty.module, empty.expected, {"embeddings": Lora(r=4, alpha=4.0)})


@pytest.mark.parametrize(
    ("change", "text", "level"),
    [
        ({"attention": DensePartConfig()}, "adapters = 'all frozen': nothing would train", "error"),
        ({"pos_embed": PartConfig(mode="lora")}, "adapters.pos_embed.mode = 'lora': it is a table", "error"),
        ({"mlp": LORA}, "adapters.mlp.mode = 'lora': tiny-moe has no such parameters. Leave it frozen", "error"),
        ({"attention": replace(LORA, r=0)}, "adapters.attention.r = 0: it must be at least 1", "error"),
        (
            {"attention": replace(LORA, alpha=float("nan"))},
            "adapters.attention.alpha = nan: it must be a finite number",
            "error",
        ),
        ({"merger": replace(LORA, dropout=1.0)}, "adapters.merger.dropout = 1.0: it must be from 0", "error"),
        ({"experts": ExpertPartConfig(mode="lora", r=6)}, "adapters.experts.r = 6: .* multiple of 8. Use 8", "error"),
        ({"experts": ExpertPartConfig(mode="lora", r=12)}, "multiple of 8 in bfloat16. Use 16", "warning"),
        ({"experts": ExpertPartConfig(r=4)}, "adapters.experts.r = 4: it is used only in mode lora", "warning"),
        ({"start_from": "nowhere"}, "adapters.start_from = 'nowhere': there is no adapter_config.json", "error"),
    ],
)
def test_the_section_is_checked(change: dict[str, Any], text: str, level: str) -> None:
    (problem,) = adapter_problems(replace(AdaptersConfig(), **change), family("tiny-moe"))
    assert problem.level == level
    assert re.search(text, str(problem))


def test_checks_across_sections_consider_the_adapters() -> None:
    tied = cross_check(
        RunConfig(model=ModelConfig(family="qwen3-vl-2b"), adapters=replace(OFF, head=PartConfig(mode="full"))),
        ranks=1,
    )
    assert "qwen3-vl-2b ties its head to its embedding" in str(next(p for p in tied if p.key == "adapters.head.mode"))
    config = RunConfig(model=ModelConfig(family="tiny-moe"), moe=MoeConfig(balance="global"))
    assert "moe.balance" in [problem.key for problem in cross_check(config, ranks=1)]
    trains = replace(config, adapters=AdaptersConfig(router=RouterPartConfig(mode="lora")))
    assert "moe.balance" not in [problem.key for problem in cross_check(trains, ranks=1)]
