"""Adapter files are reopened after writing, and bases are distinguished by their values."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import base_variants as stored
import pytest
import torch
from bases import base
from safetensors.torch import save_file

from finetune.adapters.card import card
from finetune.adapters.provenance import Provenance, base_of, other_base_text, require_same_base
from finetune.adapters.reopen import Expected, reopened
from finetune.files.basefiles import open_base
from finetune.files.fingerprint import fingerprint
from finetune.files.tiny import TinyModel, write_tiny

A, B = "base_model.model.x.mlp.experts.lora_A.weight", "base_model.model.x.mlp.experts.lora_B.weight"


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, Expected]]:
    tensors = {A: torch.ones(3 * 2, 5), B: torch.ones(7, 2 * 3), "norm.weight": torch.ones(4)}
    experts = {A: 3, B: 3, "norm.weight": 1}
    kinds = {name: Expected(dtype="F32", shape=tuple(t.shape), experts=experts[name]) for name, t in tensors.items()}
    return tmp_path / "adapter_model.safetensors", tensors, kinds


def test_a_valid_file_passes_without_warnings(made):
    file, tensors, kinds = made
    save_file(tensors, file)
    assert reopened(file, kinds, trained=True) == []


def test_a_file_with_unexpected_content_is_refused(made):
    file, tensors, kinds = made
    save_file(tensors, file)
    for other in (
        kinds | {A: replace(kinds[A], shape=(6, 4))},
        kinds | {A: replace(kinds[A], dtype="BF16")},
        kinds | {"more": kinds[A]},
    ):
        with pytest.raises(ValueError, match="was written wrongly: (base_model.*lora_A|more)"):
            reopened(file, other, trained=True)
    tensors["norm.weight"][2] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"norm.weight holds NaN or infinity; nothing was kept"):
        reopened(file, kinds, trained=True)
    tensors["norm.weight"][2] = 0
    tensors[A][2:4] = 0
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"lora_A.weight is zero for experts \[1\]: they never arrived"):
        reopened(file, kinds, trained=True)


def test_experts_that_no_token_reached_are_counted(made):
    file, tensors, kinds = made
    tensors[B][:, 1::3] = 0
    save_file(tensors, file)
    assert reopened(file, kinds, trained=True) == [
        f"experts that no token reached have a lora_B of zero in {B} (1 of 3)"
    ]
    tensors[B].zero_()
    save_file(tensors, file)
    assert reopened(file, kinds, trained=True) == [
        f"tensors that learned nothing, with a lora_B of zero (1): {B}",
    ]
    assert reopened(file, kinds, trained=False) == []


def test_one_base_has_one_fingerprint_in_every_layout_and_type(tmp_path: Path) -> None:
    tensors = stored.weights(base())
    ours = fingerprint(open_base(base()))
    for name, variant in {
        "hub": stored.hub(tensors),
        "memory": tensors,
        "per_expert": stored.per_expert(tensors),
        "wider": {key: t.to(torch.float64).float() for key, t in stored.hub(tensors).items()},
    }.items():
        assert fingerprint(open_base(stored.folder_with(tmp_path / name, base(), variant))) == ours, name
    halves = {key: t.bfloat16() for key, t in stored.hub(tensors).items()}
    in_bf16 = fingerprint(open_base(stored.folder_with(tmp_path / "bf16", base(), halves)))
    widened = {key: t.float() for key, t in halves.items()}
    assert in_bf16 == fingerprint(open_base(stored.folder_with(tmp_path / "widened", base(), widened))) != ours
    floats = {key: t.half() for key, t in stored.hub(tensors).items()}
    in_f16 = fingerprint(open_base(stored.folder_with(tmp_path / "f16", base(), floats)))
    assert in_f16 == fingerprint(
        open_base(stored.folder_with(tmp_path / "from16", base(), {key: t.float() for key, t in floats.items()}))
    )


@pytest.mark.parametrize("changed", ["model.language_model.norm.weight", "mlp.gate.weight", "mlp.experts.down_proj"])
def test_a_base_with_one_other_tensor_is_another_base(tmp_path: Path, changed: str) -> None:
    tensors = stored.hub(stored.weights(base()))
    for name in tensors:
        if name.endswith(changed):
            tensors[name] = tensors[name] * 1.01
    other = open_base(stored.folder_with(tmp_path, base(), tensors))
    files = open_base(base())
    metadata = Provenance(base=files, base_name="hub/tiny").metadata()
    assert "trained on this base" in require_same_base(tmp_path, metadata, files)
    with pytest.raises(
        ValueError, match=rf"trained on hub/tiny \(fingerprint {fingerprint(files)}\), but .*made is an"
    ):
        require_same_base(tmp_path, metadata, other)
    assert "does not say which base" in require_same_base(tmp_path, {}, other)
    assert base_of({}) is None


def test_an_adapter_says_how_its_base_was_quantised(tmp_path: Path) -> None:
    write_tiny(tmp_path / "fp8", TinyModel(fp8="stacked"))
    form = "fp8 (e4m3 in blocks of 128 x 128)"
    ours, plain = open_base(tmp_path / "fp8"), open_base(base())
    metadata = Provenance(base=ours, base_name="hub/tiny").metadata()
    assert base_of(metadata).quantised == form
    assert f"- base: hub/tiny, quantised to {form}, fingerprint" in card("hub/tiny", metadata, []).decode()
    assert "trained on this base" in require_same_base(tmp_path, metadata, ours)
    words = rf"trained on hub/tiny, quantised to {re.escape(form)} .*, but .* is another base .*, not quantised\)"
    with pytest.raises(ValueError, match=words):
        require_same_base(tmp_path, metadata, plain)
    assert other_base_text(metadata, plain).endswith(f"quantised to {form}, and this base is not quantised")
    metadata = Provenance(base=plain, base_name="hub/tiny").metadata()
    assert "quantised" not in metadata["moetune.base"]
    assert other_base_text(metadata, ours).endswith(f"it was trained on hub/tiny, and this base is {form}")


def test_sharding_and_seed(tmp_path: Path) -> None:
    write_tiny(tmp_path / "sharded", TinyModel(shard_bytes=60_000))
    write_tiny(tmp_path / "seed", TinyModel(seed=1))
    assert fingerprint(open_base(tmp_path / "sharded")) == fingerprint(open_base(base()))
    assert fingerprint(open_base(tmp_path / "seed")) != fingerprint(open_base(base()))
    shutil.rmtree(tmp_path / "seed")
