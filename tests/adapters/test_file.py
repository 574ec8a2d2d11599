"""Adapters written in PEFT's format from any layout, and read by stock PEFT and by moetune."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import DENSE, FULL, FULL_ONLY, WIDE, close, made, tensors
from base_folders import dense_model, write_base
from peft import PeftModel
from ranks import run_ranks
from safetensors.torch import save_file
from tiny_moe import media_batch, token_count, token_loss, vl_model
from torch import Tensor
from transformers import AutoModelForImageTextToText

from finetune.adapters.contents import families_text, read_families
from finetune.adapters.file import open_adapter
from finetune.adapters.merge import merge
from finetune.adapters.merge_plan import plan_merge
from finetune.adapters.provenance import Provenance, base_of
from finetune.adapters.write_trained import write_adapter
from finetune.config import AdaptersConfig, DensePartConfig, PartConfig, RouterPartConfig
from finetune.files.basefiles import open_base
from finetune.files.fingerprint import fingerprint
from finetune.model.empty import EmptyModel
from finetune.model.lora import trainable_table
from finetune.model.weights import load_weights
from moe.experts import ExpertLora


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    models = {"moe": vl_model(layers=3), "dense": dense_model()}
    return {name: write_base(model, tmp_path_factory.mktemp("base") / name) for name, model in models.items()}


def frozen_sums(empty: EmptyModel) -> dict[str, float]:
    """A sum for each tensor that must not change: buffers, and this rank's slice of frozen parameters."""
    frozen = dict(empty.module.named_buffers())
    frozen |= {name: p.ds_tensor for name, p in empty.module.named_parameters() if name not in empty.trained}
    return {name: float(tensor.double().abs().sum()) for name, tensor in frozen.items()}


def session(rank: int, world: int, out: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Load each case (from an adapter), write the file, train two steps on the same global rows, write it again.

    eps is above the noise of the smallest gradients, from which Adam would otherwise make full steps.
    """
    from finetune.ranks.engine import EngineOptions, backward, engine_config, initialize, start_distributed

    start_distributed()
    results = []
    for case in cases:
        base = case["base"]
        empty = made(base, case["config"], ep=case["ep"], resident=case["resident"])
        options = EngineOptions(dtype="float32", lr=1e-3, eps=1e-4, micro_batches_per_step=4 // world)
        start = open_adapter(case["start"]) if "start" in case else None
        files = open_base(base, empty.expected)
        load_weights(empty, files, engine_config=engine_config(options), start=start)
        origin = Provenance(base=files, base_name=str(base), config={"run": {"seed": 3}, "parallel": {"ep": world}})
        try:
            warned = write_adapter(empty, out / case["name"] / "before", base=str(base), provenance=origin)
        except (RuntimeError, ValueError) as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
            continue
        engine = initialize(empty.module, options)
        before, first = frozen_sums(empty), logits(engine)
        total = token_count(media_batch(slice(0, 4))["input_ids"])
        for _ in range(case.get("steps", 2)):
            for row in range(rank * 4 // world, (rank + 1) * 4 // world):
                data = media_batch(slice(row, row + 1))
                backward(engine, token_loss(engine(**data, use_cache=False).logits, data["input_ids"]), total)
                engine.step()
        write_adapter(empty, out / case["name"] / "after", base=str(base), extra={"step": "2"})
        changed = [name for name, value in frozen_sums(empty).items() if value != before[name]]
        trainable = {name for name, parameter in empty.module.named_parameters() if parameter.requires_grad}
        results.append({"first": first, "logits": logits(engine), "changed": changed, "warned": warned})
        assert trainable == set(empty.trained)
        table = trainable_table(empty)  # does not depend on ZeRO and ep
        assert sum(row.trained for row in table) == sum(load_sizes(out / case["name"] / "after").values())
    return results


def load_sizes(adapter: Path) -> dict[str, int]:
    return {name: tensor.numel() for name, tensor in tensors(adapter).items()}


def logits(engine: Any) -> Tensor:
    engine.eval()
    with torch.no_grad():
        values = engine(**media_batch(slice(0, 2)), use_cache=False).logits
    engine.train()
    return values


def case(name: str, base: Path, config: AdaptersConfig, ep: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "base": base, "config": config, "ep": ep, "resident": True, **more}


def stock(base: Path, adapter: Path | None = None) -> Tensor:
    """Logits of transformers' own model, with the adapter loaded by stock PEFT."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(**media_batch(slice(0, 2)), use_cache=False).logits


@pytest.fixture(scope="module")
def trained(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All cases that need ranks, in three starts; later starts continue the adapters of the first."""
    out = tmp_path_factory.mktemp("adapters")
    moe, dense = folders["moe"], folders["dense"]
    (out / "taken" / "before").mkdir(parents=True)
    (out / "taken" / "before" / "file").touch()
    two = [case("w2", moe, WIDE, 2), case("w2-zero", moe, WIDE, 2, resident=False), case("full", moe, FULL, 2)]
    two += [case("dense", dense, DENSE, 1), case("full-only", dense, FULL_ONLY, 1), case("taken", dense, DENSE, 1)]
    four = [case("w4", moe, WIDE, 4), case("again", moe, WIDE, 4, start=out / "w2" / "after", steps=0)]
    four += [case("full-again", moe, FULL, 2, start=out / "full" / "after", steps=0)]
    results: dict[str, Any] = {}
    for world, cases in ((2, two), (1, [case("w1", moe, WIDE, 1)]), (4, four)):
        ranks = run_ranks(session, world, out, cases)
        results |= {each["name"]: [rank[at] for rank in ranks] for at, each in enumerate(cases)}
    return out, results


@pytest.mark.parametrize("name", ["w1", "w2", "w2-zero", "w4", "full", "dense", "full-only"])
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_stock_peft_on_the_stock_model_computes_what_we_do(
    folders: dict[str, Path], trained: tuple[Path, dict[str, Any]], name: str
) -> None:
    out, results = trained
    folder = folders["dense" if name in ("dense", "full-only") else "moe"]
    base, adapted = stock(folder), stock(folder, out / name / "after")
    assert (adapted - base).abs().max() > 1e-3 * base.abs().max(), "two steps change the model"
    for rank in results[name]:
        assert close(rank["logits"], adapted, 1e-5)
        assert close(rank["first"], base, 1e-5)
        assert rank["changed"] == []


@pytest.mark.parametrize("name", ["w2", "full", "dense", "full-only"])
def test_the_stock_model_computes_what_we_do_after_a_merge(
    folders: dict[str, Path], trained: tuple[Path, dict[str, Any]], name: str, tmp_path: Path
) -> None:
    out, results = trained
    base = folders["dense" if name in ("dense", "full-only") else "moe"]
    merged = merge(plan_merge(open_base(base), out / name / "after"), tmp_path / "merged")
    assert merged.applied == merged.intended
    assert close(results[name][0]["logits"], stock(tmp_path / "merged"), 1e-5)


def apart(first_folder: Path, second_folder: Path) -> float:
    """The largest difference of two adapters, relative to each tensor's largest value."""
    first, second = tensors(first_folder), tensors(second_folder)
    assert list(first) == list(second)
    scale = {name: tensor.abs().max().clamp_min(1e-12) for name, tensor in first.items()}
    return max(float((first[name] - second[name]).abs().max() / scale[name]) for name in first)


def test_one_seed_gives_the_same_adapter_at_any_ep(trained: tuple[Path, dict[str, Any]]) -> None:
    out, _ = trained
    written = [(out / name / "before" / "adapter_model.safetensors").read_bytes() for name in ("w1", "w2", "w4")]
    assert written[0] == written[1] == written[2]
    assert (out / "w2-zero/before/adapter_model.safetensors").read_bytes() == written[0]
    for name in ("w2", "w2-zero", "w4"):
        assert apart(out / "w1/after", out / name / "after") < 1e-4
    configs = {(out / name / "after/adapter_config.json").read_text() for name in ("w1", "w2", "w2-zero", "w4")}
    assert len(configs) == 1


def test_a_file_is_reopened_and_tensors_that_learned_nothing_are_named(trained: tuple[Path, dict[str, Any]]) -> None:
    _, results = trained
    first, second = (rank["warned"] for rank in results["w2"])
    assert len(first) == 1
    assert re.search(
        r"^tensors that learned nothing, with a lora_B of zero \(\d+\): .*lora_B.weight.* and \d+ more", first[0]
    )
    assert second == [], "only rank 0 writes"


def test_the_file_names_its_base(folders: dict[str, Path], trained: tuple[Path, dict[str, Any]]) -> None:
    folder = trained[0] / "w2/before"
    adapter = open_adapter(folder)
    named = base_of(adapter.metadata)
    assert named is not None
    assert (named.name, named.fingerprint) == (str(folders["moe"]), fingerprint(open_base(folders["moe"])))
    assert json.loads(adapter.metadata["moetune.config"]) == {"run": {"seed": 3}}
    assert set(json.loads(adapter.metadata["moetune.versions"])) >= {"peft", "torch", "transformers"}
    text = (folder / "README.md").read_text()
    for line in (f"fingerprint `{named.fingerprint}`", "| experts | lora of r 4, scale 3 | 12 |", "moetune merge"):
        assert line in text


def test_every_trained_tensor_changed(trained: tuple[Path, dict[str, Any]]) -> None:
    out, _ = trained
    for name in ("w2", "full"):
        before, after = tensors(out / name / "before"), tensors(out / name / "after")
        assert [key for key in before if torch.equal(before[key], after[key])] == []
        factors = [key for key in before if ".lora_B." in key]
        assert factors
        assert all(not before[key].any() for key in factors)


@pytest.mark.parametrize(("again", "first"), [("again", "w2"), ("full-again", "full")])
def test_training_continues_from_a_file_at_another_layout(
    trained: tuple[Path, dict[str, Any]], again: str, first: str
) -> None:
    out, results = trained
    assert apart(out / first / "after", out / again / "before") == 0.0
    assert close(results[again][0]["first"], results[first][0]["logits"], 1e-5)


def test_peft_and_servers_can_read_the_config(trained: tuple[Path, dict[str, Any]]) -> None:
    out, _ = trained
    config = json.loads((out / "w2/after/adapter_config.json").read_text())
    assert (config["lora_dropout"], config["use_rslora"], config["r"], config["lora_alpha"]) == (0.0, False, 4, 12.0)
    layers = r"model\.language_model\.layers\.\d+\.self_attn\."
    attention = "|".join(f"{layers}{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert config["rank_pattern"][attention] == 5
    assert sorted(config["rank_pattern"].values()) == [3, 5]
    assert attention not in config["alpha_pattern"], (
        "the scale of experts, 6 / 2, is alpha 12 at r 4; so is attention's"
    )
    assert sorted(config["alpha_pattern"].values()) == [7.0]
    assert config["modules_to_save"] == [f"model.language_model.layers.{n}.mlp.gate" for n in (0, 1, 2)]
    assert "model.visual.blocks.0.attn.qkv" in config["target_modules"]
    assert "model.language_model.layers.1.mlp.experts.down_proj" in config["target_parameters"]
    adapter = open_adapter(out / "w2/after")
    assert adapter.families["experts"].rslora
    assert adapter.metadata["moetune.step"] == "2"


def test_adapters_that_cannot_be_continued_are_refused(
    folders: dict[str, Path], trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    adapter = open_adapter(trained[0] / "w2/after")
    with pytest.raises(ValueError, match=r"adapts a qwen3_vl_moe, but this base is a qwen3_vl"):
        adapter.check_fits(made(folders["dense"], DENSE))
    for other, text in {
        replace(WIDE, attention=DensePartConfig(mode="lora", r=6, alpha=12.0)): (
            r"has attention as lora of r 5, scale 2.4, but adapters.attention is lora of r 6, scale 2. Set"
        ),
        replace(WIDE, router=RouterPartConfig()): "has router as full, but adapters.router is frozen",
    }.items():
        with pytest.raises(ValueError, match=text):
            adapter.check_fits(made(folders["moe"], other))
    more = made(folders["moe"], replace(WIDE, norms=PartConfig(mode="full")))
    adapter.check_fits(more)  # a part that the adapter lacks starts from its initial values
    taller = write_base(vl_model(layers=4), tmp_path / "taller")
    with pytest.raises(
        ValueError, match=r"layers.3.self_attn.q_proj.lora_A.weight is absent in the adapter, \[5, 48\] in"
    ):
        adapter.check_fits(made(taller, WIDE))
    with pytest.raises(ValueError, match=r"holds no adapter: adapter_model.safetensors is missing"):
        open_adapter(tmp_path)
    save_file(tensors(adapter.folder), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"of another tool: its metadata lacks moetune.families"):
        open_adapter(tmp_path)


def test_an_error_on_the_writing_rank_ends_all_ranks(trained: tuple[Path, dict[str, Any]]) -> None:
    """No rank waits for a rank that cannot write."""
    first, second = (rank["error"] for rank in trained[1]["taken"])
    assert first.startswith("ValueError: ")
    assert "exists and is not empty" in first
    assert second.startswith("RuntimeError: rank 1 stops because writing")
    assert "failed on rank 0: ValueError" in second


def test_metadata_keeps_the_part_names_of_older_files() -> None:
    parts = {"attention": ExpertLora(r=4, alpha=6.0), "embeddings": None, "head": None}
    written = families_text(parts)
    assert {name: bool(values) for name, values in json.loads(written).items()} == {
        "attention": True,
        "embed_tokens": False,
        "lm_head": False,
    }
    assert read_families(written) == parts
