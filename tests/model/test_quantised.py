"""Training beside quantised weights equals training on a base that was quantised and dequantised beforehand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from base_folders import dense_model, write_base
from ranks import run_ranks
from tiny_moe import ROWS, media_batch, token_count, token_loss, vl_model

from finetune.architecture.shapes import is_expert_stack, part_of
from finetune.files.basefiles import open_base
from finetune.model.build import build
from finetune.model.empty import ModelOptions
from finetune.model.nodes import join_nodes
from finetune.model.recompute import set_recompute
from finetune.model.weights import load_weights
from moe.experts import ExpertLora
from moe.kernels.packed import Packing
from moe.parallel import LayerOptions

STEPS, LORA = 5, ExpertLora(r=4, alpha=8)
EPS = 1e-4
"""Large, because Adam amplifies the rounding of gradients that are smaller than this."""
BITS = ["int8", "nf4"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a base, and for each form the same base with the values that the form gives its matrices."""
    made = {}
    for name, make in {"moe": vl_model, "dense": dense_model}.items():
        for bits in ("none", *BITS):
            model = make()
            for key, parameter in model.named_parameters():
                if bits != "none" and parameter.ndim > 1 and part_of(key) in ("experts", "attention", "mlp"):
                    matrices = parameter.data if is_expert_stack(key) else parameter.data[None]
                    packing = Packing(bits=bits, out=matrices.shape[1], into=matrices.shape[2])
                    packing.unpack(packing.pack(matrices, name=key), matrices)
            made[f"{name}-{bits}"] = write_base(model, tmp_path_factory.mktemp("base") / f"{name}-{bits}")
    return made


def session(rank: int, world: int, folder: Path, bits: Any, cases: list[tuple[int, bool, str]]) -> list[dict[str, Any]]:
    """Train at each (ep, resident, recompute); return losses, every gradient, the values at the end, and bytes."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from finetune.ranks.engine import EngineOptions, backward, engine_config, initialize, start_distributed

    start_distributed()
    results = []
    for ep, resident, recompute in cases:
        moe = "moe" in folder.name
        layer = LayerOptions(resident=resident)
        if moe:
            layer = LayerOptions(experts="lora", lora=LORA, resident=resident, bits=bits)
        lora = {"attention": LORA} | ({} if moe else {"mlp": LORA})
        options = ModelOptions(
            ep_size=ep, layer=layer, lora=lora, resident=resident, dtype=torch.float32, dense_bits=bits
        )
        empty = build(folder, options)
        engine_options = EngineOptions(
            dtype="float32", micro_batches_per_step=ROWS // world, clip_norm=0.0, lr=1e-3, eps=EPS
        )
        files = open_base(folder, empty.expected)
        report = load_weights(empty, files, engine_config=engine_config(engine_options))
        join_nodes(empty.module)
        set_recompute(empty.module, recompute)
        engine = initialize(empty.module, engine_options)
        engine.train()
        total, losses, gradients = token_count(media_batch(slice(0, ROWS))["input_ids"]), [], {}
        for step in range(STEPS):
            loss = 0.0
            for row in range(rank * ROWS // world, (rank + 1) * ROWS // world):
                data = media_batch(slice(row, row + 1))
                part = token_loss(engine(**data, use_cache=False).logits, data["input_ids"])
                backward(engine, part, total)
                loss += part.item() / total
                if step == 1:  # the factors B are zero in the first step, and so are the gradients of A
                    named = engine.module.named_parameters()
                    gradients = {name: safe_get_full_grad(p).clone() for name, p in named if p.requires_grad}
                engine.step()
            losses.append(loss)
        trained = {
            name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters() if p.requires_grad
        }
        results.append({"loss": losses, "gradients": gradients, "trained": trained, "held": report.bytes_held})
    return results


def _check(folders: dict[str, Path], kind: str, bits: str, world: int, cases: list[tuple[int, bool, str]]) -> None:
    ours = run_ranks(session, world, folders[f"{kind}-none"], bits, cases)
    theirs = run_ranks(session, world, folders[f"{kind}-{bits}"], None, cases)
    for mine, plain in zip(ours, theirs, strict=True):
        for case, found, expected in zip(cases, mine, plain, strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5), case
            assert found["held"] < expected["held"], case
            for what in ("gradients", "trained"):
                assert found[what].keys() == expected[what].keys()
                for name, value in expected[what].items():
                    error = (found[what][name] - value).abs().max()
                    assert error <= 1e-5 * value.abs().max(), f"{case}, {what}: {name}"
                    assert math.isfinite(error)


MODES = ("none", "layer", "selective")


@pytest.mark.parametrize("bits", BITS)
def test_one_rank(folders: dict[str, Path], bits: str) -> None:
    _check(folders, "moe", bits, 1, [(1, True, "selective"), (1, False, "layer")])


def test_two_ranks(folders: dict[str, Path]) -> None:
    _check(folders, "moe", "nf4", 2, [(2, True, "selective"), (1, False, "selective")])


def test_a_dense_model(folders: dict[str, Path]) -> None:
    _check(folders, "dense", "nf4", 1, [(1, True, "selective"), (1, False, "none")])


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 2), (4, 2)])
def test_every_layout(folders: dict[str, Path], bits: str, world: int, ep: int) -> None:
    cases = [(ep, resident, mode) for resident in (True, False) for mode in MODES]
    _check(folders, "moe", bits, world, cases)


def test_a_part_that_trains_in_full_is_refused(folders: dict[str, Path]) -> None:
    options = ModelOptions(train=("attention",), dense_bits="int8", dtype=torch.float32)
    with pytest.raises(ValueError, match="attention trains in full and cannot be quantised to int8"):
        build(folders["moe-none"], options)


@pytest.mark.parametrize("bits", BITS)
def test_a_load_that_confuses_experts_is_noticed(
    folders: dict[str, Path], bits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of quantised experts are compared with the file, within the error of the form."""
    empty = build(folders["moe-none"], ModelOptions(layer=LayerOptions(bits=bits), dtype=torch.float32))
    files = open_base(folders["moe-none"], empty.expected)
    load_weights(empty, files)
    read = type(files).read

    def shifted(self: Any, name: str, rows: range | None = None) -> torch.Tensor:
        values = read(self, name, rows)
        return values.roll(1, 1) if is_expert_stack(name) else values

    monkeypatch.setattr(type(files), "read", shifted)
    empty = build(folders["moe-none"], ModelOptions(layer=LayerOptions(bits=bits), dtype=torch.float32))
    with pytest.raises(ValueError, match=r"gate_up_proj, expert 0: row 0 in memory differs from the file"):
        load_weights(empty, files)
