"""Adapters out and in: PEFT's own file, from any layout, read by stock PEFT and by us."""

from pathlib import Path
from typing import Any

import pytest
import torch
from base_folders import dense_model, write_base
from peft import PeftModel
from ranks import run_ranks
from test_weights import batch
from tiny_moe import token_count, token_loss, vl_model
from torch import Tensor
from transformers import AutoModelForImageTextToText

from finetune.adapter_file import open_adapter, write_adapter
from finetune.adapters import settle
from finetune.basefiles import open_base
from finetune.config import (
    AdaptersConfig,
    DenseFamilyConfig,
    ExpertFamilyConfig,
    FamilyConfig,
    RouterFamilyConfig,
)
from finetune.model import EmptyModel, ModelOptions, build
from finetune.weights import load
from moe.parallel import LayerOptions

WIDE = AdaptersConfig(
    attention=DenseFamilyConfig(mode="lora", r=5, alpha=12.0),
    experts=ExpertFamilyConfig(mode="lora", r=4, alpha=6.0, rslora=True),
    vision_blocks=DenseFamilyConfig(mode="lora", r=3, alpha=7.0),
    router=RouterFamilyConfig(mode="full"),
)
FULL = AdaptersConfig(  # everything that can be kept in full, and a router's LoRA
    attention=DenseFamilyConfig(mode="full"),
    experts=ExpertFamilyConfig(mode="full"),
    router=RouterFamilyConfig(mode="lora", r=7, alpha=9.0),
    merger=DenseFamilyConfig(mode="lora", r=6, alpha=9.0),
    deepstack_mergers=DenseFamilyConfig(mode="full"),
    **{family: FamilyConfig(mode="full") for family in ("patch_embed", "pos_embed", "norms", "embeddings", "head")},
)
DENSE = AdaptersConfig(
    attention=DenseFamilyConfig(mode="lora", r=5, alpha=12.0),
    mlp=DenseFamilyConfig(mode="lora", r=4, alpha=4.0, rslora=True),
    merger=DenseFamilyConfig(mode="full"),
)
FULL_ONLY = AdaptersConfig(merger=DenseFamilyConfig(mode="full"), norms=FamilyConfig(mode="full"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    models = {"moe": vl_model(layers=2), "dense": dense_model()}
    return {name: write_base(model, tmp_path_factory.mktemp("base") / name) for name, model in models.items()}


def made(base: Path, config: AdaptersConfig, *, ep: int = 1, resident: bool = True) -> EmptyModel:
    options = ModelOptions(
        ep_size=ep, layer=LayerOptions(resident=resident, seed=3), resident=resident, dtype=torch.float32
    )
    return build(base, settle(config, options))


def frozen_hashes(empty: EmptyModel) -> dict[str, float]:
    return {name: float(buffer.double().sum()) for name, buffer in empty.module.named_buffers() if "bias" not in name}


def session(rank: int, world: int, base: Path, out: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per case: load (from an adapter), write the file before training, two steps on the same global rows, again."""
    from finetune.engine import EngineOptions, backward, engine_config, initialize, start_distributed

    start_distributed()
    results = []
    for case in cases:
        empty = made(base, case["config"], ep=case["ep"], resident=case["resident"])
        options = EngineOptions(dtype="float32", lr=1e-3, eps=1e-6, micro_batches_per_step=4 // world)
        start = open_adapter(case["start"]) if "start" in case else None
        load(empty, open_base(base, empty.expected), engine_config=engine_config(options), start=start)
        write_adapter(empty, out / case["name"] / "before", base=str(base))
        engine = initialize(empty.module, options)
        before, first = frozen_hashes(empty), logits(engine)
        total = token_count(batch(slice(0, 4))["input_ids"])
        for _ in range(case.get("steps", 2)):
            for row in range(rank * 4 // world, (rank + 1) * 4 // world):
                data = batch(slice(row, row + 1))
                backward(engine, token_loss(engine(**data, use_cache=False).logits, data["input_ids"]), total)
                engine.step()
        write_adapter(empty, out / case["name"] / "after", base=str(base), extra={"step": "2"})
        changed = [name for name, value in frozen_hashes(empty).items() if value != before[name]]
        results.append({"first": first, "logits": logits(engine), "changed": changed})
    return results


def logits(engine: Any) -> Tensor:
    engine.eval()
    with torch.no_grad():
        found = engine(**batch(slice(0, 2)), use_cache=False).logits
    engine.train()
    return found


def case(name: str, ep: int, config: AdaptersConfig = WIDE, *, resident: bool = True, **more: Any) -> dict[str, Any]:
    return {"name": name, "ep": ep, "config": config, "resident": resident, **more}


def stock(base: Path, adapter: Path | None = None) -> Tensor:
    """Logits of transformers' own model, with stock PEFT's own reading of the adapter."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(**batch(slice(0, 2)), use_cache=False).logits


def close(one: Tensor, two: Tensor, tolerance: float) -> bool:
    return bool((one - two).abs().max() <= tolerance * two.abs().max())


@pytest.fixture(scope="module")
def trained(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Everything that needs ranks, in three starts; the later ones continue what the first wrote."""
    out = tmp_path_factory.mktemp("adapters")
    moe = folders["moe"]
    two = [case("w2", 2), case("w2-zero", 2, resident=False), case("full", 2, FULL)]
    one = [case("w1", 1)]
    again = {"start": out / "w2" / "after", "steps": 0}
    four = [case("w4", 4), case("again", 4, **again), case("full-again", 2, FULL, start=out / "full/after", steps=0)]
    results: dict[str, Any] = {}
    for world, cases in ((2, two), (1, one), (4, four)):
        ranks = run_ranks(session, world, moe, out, cases)
        results |= {each["name"]: [rank[at] for rank in ranks] for at, each in enumerate(cases)}
    return out, results


@pytest.mark.parametrize("name", ["w1", "w2", "w2-zero", "w4", "full"])
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_stock_peft_on_the_stock_model_computes_what_we_do(
    folders: dict[str, Path], trained: tuple[Path, dict[str, Any]], name: str
) -> None:
    out, results = trained
    base = stock(folders["moe"])
    found = stock(folders["moe"], out / name / "after")
    assert (found - base).abs().max() > 1e-3 * base.abs().max(), "two steps change the model"
    for rank in results[name]:
        assert close(rank["logits"], found, 1e-5)
        assert close(rank["first"], base, 1e-5)
        assert rank["changed"] == []
