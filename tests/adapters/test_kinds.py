"""Adapter files of other models and data types, and guards against half-written files; without ranks."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_cases import WIDE, close, made, tensors
from base_folders import write_base
from peft import PeftModel
from safetensors.torch import save_file
from tiny_moe import text_model, vl_model

from finetune.adapters.contents import trained_tensors
from finetune.adapters.write_trained import gathered_pieces, write_adapter, write_pieces
from finetune.config import AdaptersConfig, DensePartConfig, ExpertPartConfig, RouterPartConfig
from finetune.files.basefiles import open_base
from finetune.model.build import build
from finetune.model.empty import ModelOptions
from finetune.model.lora import with_adapters
from finetune.model.weights import load_weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(vl_model(layers=3), tmp_path_factory.mktemp("base") / "moe")


def test_an_incomplete_stack_is_not_written(base: Path, tmp_path: Path) -> None:
    empty = made(base, WIDE)
    load_weights(empty, open_base(base, empty.expected))
    trained = list(trained_tensors(empty))
    pieces = [
        (tensor, first, rows[: len(rows) // 2] if tensor.is_packed else rows)
        for tensor, first, rows in gathered_pieces(trained)
    ]
    with pytest.raises(ValueError, match=r"12 of \d+ tensors reached rank 0 incomplete, .*experts or rows \[6, 7, 8,"):
        write_pieces(empty, tmp_path / "out", trained, pieces, base="", trained=False)
    assert list(tmp_path.iterdir()) == []


TEXT = AdaptersConfig(
    attention=DensePartConfig(mode="lora", r=5, alpha=12.0),
    experts=ExpertPartConfig(mode="lora", r=8),
    router=RouterPartConfig(mode="lora", r=3),
)


@pytest.mark.parametrize("config", [TEXT, replace(TEXT, experts=ExpertPartConfig(mode="full"))], ids=["lora", "full"])
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_a_text_only_moe(tmp_path: Path, config: AdaptersConfig) -> None:
    """Its layers have another prefix, and PEFT has special rules for it."""
    model = text_model().eval()
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    empty = made(tmp_path, config)
    load_weights(empty, open_base(tmp_path, empty.expected))
    with torch.no_grad():
        for name in empty.trained:
            parameter = empty.module.get_parameter(name)
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    write_adapter(empty, tmp_path / "adapter", base=str(tmp_path))
    ids = torch.randint(0, 160, (2, 11), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = model(ids).logits
        ours, theirs = (
            empty.module.eval()(ids).logits,
            PeftModel.from_pretrained(model, tmp_path / "adapter")(ids).logits,
        )
    assert not close(before, ours, 1e-2)
    assert close(ours, theirs, 1e-5)


def test_bfloat16_stays_bfloat16(base: Path, tmp_path: Path) -> None:
    config = replace(WIDE, experts=ExpertPartConfig(mode="lora", r=8))
    empty = build(base, with_adapters(config, ModelOptions()))
    load_weights(empty, open_base(base, empty.expected))
    write_adapter(empty, tmp_path / "adapter", base="")
    assert {tensor.dtype for tensor in tensors(tmp_path / "adapter").values()} == {torch.bfloat16}


def test_a_full_disk_is_noticed_before_the_first_tensor(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, begin: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    empty = made(base, WIDE)
    load_weights(empty, open_base(base, empty.expected))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"the disk of .* is full"):
        write_adapter(empty, tmp_path / "out", base="")
    assert list(tmp_path.iterdir()) == []
