"""Loading: after streaming to any layout, losses and gradients equal transformers' own `from_pretrained`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from base_folders import dense_model, write_base
from ranks import run_ranks
from tiny_moe import END, IMAGE, PATCH, START, VIDEO, token_count, token_loss, vl_model
from torch import Tensor
from transformers import AutoModelForImageTextToText

from finetune.basefiles import open_base
from finetune.model import ModelOptions, build
from finetune.weights import load
from moe.experts import ExpertLora
from moe.parallel import LayerOptions

ROWS = 4
EVERYTHING = (
    *("embed_tokens", "lm_head", "attention", "norms", "vision_blocks"),
    *("patch_embed", "pos_embed", "merger", "deepstack_mergers"),
)


def batch(rows: slice) -> dict[str, Tensor]:
    """Rows of text around one image and a video of two frames; odd rows without the image."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 160, (ROWS, 30), generator=generator)
    for row in ids:
        row[3], row[4:8], row[8] = START, IMAGE, END
        row[12], row[13:17], row[17], row[19], row[20:24], row[24] = START, VIDEO, END, START, VIDEO, END
    pictures = torch.randn(ROWS, 16, PATCH, generator=generator)
    frames = torch.randn(ROWS, 32, PATCH, generator=generator)
    ids = ids[rows]
    count = ids.shape[0]
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        "pixel_values": pictures[rows].flatten(0, 1),
        "image_grid_thw": torch.tensor([[1, 4, 4]]).repeat(count, 1),
        "pixel_values_videos": frames[rows].flatten(0, 1),
        "video_grid_thw": torch.tensor([[2, 4, 4]]).repeat(count, 1),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A MoE and a dense base in the hub's layout, with transformers' loss and gradients beside each."""
    made = {}
    for name, model in {"moe": vl_model(), "dense": dense_model()}.items():
        made[name] = write_base(model, tmp_path_factory.mktemp("base") / name)
        reference = AutoModelForImageTextToText.from_pretrained(made[name], dtype=torch.float32)
        data = batch(slice(0, ROWS))
        loss = token_loss(reference(**data).logits, data["input_ids"]) / token_count(data["input_ids"])
        loss.backward()
        gradients = {key: parameter.grad for key, parameter in reference.named_parameters()}
        torch.save({"loss": loss.item(), "gradients": gradients}, made[name].with_suffix(".reference"))
    return made


def session(rank: int, world: int, folder: Path, cases: list[tuple[int, bool]]) -> list[dict[str, Any]]:
    """Per (ep, resident): load, one step's backward, worst relative error against the reference."""
    from deepspeed.utils import safe_get_full_grad

    from finetune.engine import EngineOptions, backward, engine_config, initialize, start_distributed

    start_distributed()
    reference = torch.load(folder.with_suffix(".reference"))
    results = []
    for ep, resident in cases:
        moe = "moe" in folder.name
        layer = LayerOptions(experts="full", resident=resident)
        train = EVERYTHING if moe else (*EVERYTHING, "mlp")
        if resident:
            layer, train = LayerOptions(experts="lora", lora=ExpertLora(r=4, alpha=8), resident=True), ("attention",)
        options = ModelOptions(ep_size=ep, layer=layer, train=train, resident=resident, dtype=torch.float32)
        empty = build(folder, options)
        files = open_base(folder, empty.expected)
        engine_options = EngineOptions(dtype="float32", micro_batches_per_step=ROWS // world, clip_norm=0.0)
        report = load(empty, files, engine_config=engine_config(engine_options))
        engine = initialize(empty.module, engine_options)
        total, loss = token_count(batch(slice(0, ROWS))["input_ids"]), 0.0
        for row in range(rank * ROWS // world, (rank + 1) * ROWS // world):
            data = batch(slice(row, row + 1))
            part = token_loss(engine(**data, use_cache=False).logits, data["input_ids"])
            backward(engine, part, total)
            loss += part.item() / total
        worst = {}
        for name, parameter in engine.module.named_parameters():
            wanted = reference["gradients"].get(empty.canonical(name))
            found = safe_get_full_grad(parameter)
            if wanted is None or found is None:
                assert "lora_" in name or not parameter.requires_grad, name
                continue
            if name.endswith((".experts.gate_up", ".experts.down")):
                local = found.shape[0]
                wanted = wanted[(rank % ep) * local : (rank % ep + 1) * local]
            worst[name] = ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)).item()
        results.append({"loss": loss, "worst": worst, "read": report.bytes_read, "held": report.bytes_held})
    return results


def _check(folder: Path, world: int, cases: list[tuple[int, bool]]) -> None:
    reference = torch.load(folder.with_suffix(".reference"))
    ranks = run_ranks(session, world, folder, cases)
    on_disk = sum(p.numel() * 4 for p in reference["gradients"].values())
    for at, (ep, resident) in enumerate(cases):
        found = [rank[at] for rank in ranks]
        assert sum(result["loss"] for result in found) == pytest.approx(reference["loss"], rel=1e-5)
        assert sum(result["read"] for result in found) == on_disk, "each byte is read once"
        for result in found:
            name, error = max(result["worst"].items(), key=lambda item: item[1])
            assert error < 1e-5, f"ep {ep}, resident {resident}: {name}"
            assert resident or len(result["worst"]) == len(reference["gradients"])


WORLDS = [(1, [(1, False), (1, True)]), (2, [(2, False), (2, True)]), (4, [(2, False), (4, True), (4, False)])]


@pytest.mark.parametrize(("world", "cases"), WORLDS)
def test_moe_loads_exactly_at_any_layout(folders: dict[str, Path], world: int, cases: list[tuple[int, bool]]) -> None:
    _check(folders["moe"], world, cases)


def test_dense_loads_exactly(folders: dict[str, Path]) -> None:
    _check(folders["dense"], 2, [(1, False), (1, True)])
