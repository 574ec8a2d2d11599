"""The proof of a merge: a correct merge passes, and one that is wrong in any of the usual ways fails."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import base_variants as stored
import merge_cases as cases
import pytest
import torch
from bases import base
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.adapters.merge import merge
from finetune.adapters.merge_plan import plan_merge
from finetune.files.basefiles import open_base
from finetune.files.tiny import TinyModel, write_tiny
from finetune.verify.codes import compare_codes
from finetune.verify.merged import Proof, proof_samples, prove
from launchers.cli import main


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an adapter that changes experts, attention, vision, router and norm, and with its merge."""
    folder = tmp_path_factory.mktemp("made")
    cases.adapt(base(), folder / "adapter", full=True)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    router = "base_model.model.model.language_model.layers.1.mlp.gate"
    tensors |= {f"{router}.lora_A.weight": torch.randn(4, 48), f"{router}.lora_B.weight": 0.1 * torch.randn(8, 4)}
    tensors |= {f"base_model.model.lm_head.lora_{x}.weight": torch.randn(s) for x, s in HEAD.items()}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    merge(plan_merge(open_base(base()), folder / "adapter"), folder / "out")
    return folder


HEAD = {"A": (4, 48), "B": (open_base(base()).shapes["lm_head.weight"][0], 4)}


def proof(made: Path, merged: Path) -> Proof:
    plan = plan_merge(open_base(base()), made / "adapter")
    return prove(merged, plan, proof_samples(base(), "", 0), device="cpu")


def test_a_correct_merge_is_proved_to_the_last_digits(made: Path) -> None:
    result = proof(made, made / "out")
    assert result.passed
    assert result.worst < 1e-5
    assert result.moved > 0.1
    assert result.bytes_peak < open_base(base()).stored["lm_head.weight"].size * 4
    assert result.line().startswith(
        f"proved   {result.positions} positions of {result.samples} samples: the merged F32 "
    )


@pytest.mark.parametrize("wrong", ["nothing merged", "one tensor not", "experts shifted", "twice", "not finite"])
def test_a_wrong_merge_fails(made: Path, wrong: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made / "out", out)
    with safe_open(out / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    before, after = load_file(base() / "model.safetensors"), load_file(out / "model.safetensors")
    experts = "model.language_model.layers.0.mlp.experts.down_proj"
    if wrong == "nothing merged":
        after = before
    elif wrong == "one tensor not":
        after[experts] = before[experts]
    elif wrong == "experts shifted":
        after[experts] = after[experts].roll(1, 0)
    elif wrong == "twice":
        after[experts] = 2 * after[experts] - before[experts]
    else:
        after[experts][:, 0, 0] = float("nan")
    save_file(after, out / "model.safetensors", metadata=metadata)
    result = proof(made, out)
    assert not result.passed
    assert result.line().startswith("FAILED")


def test_bfloat16_differs_only_by_rounding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(tmp_path / "base", TinyModel(dtype="bfloat16"))
    cases.adapt(tmp_path / "base", tmp_path / "adapter")
    words = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out"), "--verify"]
    assert main(words) == 0
    assert re.search(r"proved .* merged BF16 files are \d\.\de-0[1-4] of", capsys.readouterr().out)


def test_samples_from_the_user_are_proved_too(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Say red."}, {"role": "assistant", "content": "Red."}]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (64, 48), (200, 20, 20)).save(pictures / "red.png")
    seen = {"messages": [turns[0] | {"content": "<image>Which?"}, turns[1]], "images": ["red.png"]}
    rows.write_text("".join(json.dumps(row) + "\n" for row in [{"messages": turns}, seen] * 2 + [seen]))
    tensors = stored.weights(base())
    shutil.copytree(base(), tmp_path / "memory", ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, tmp_path / "memory" / "model.safetensors")
    words = ["merge", str(tmp_path / "memory"), str(made / "adapter"), str(tmp_path / "out"), "--json"]
    words += ["--verify", str(rows), "--samples", "3"]
    assert main(words) == 2, "the picture is elsewhere"
    capsys.readouterr()
    assert main([*words, "--media-root", str(pictures)]) == 0
    proof = json.loads(capsys.readouterr().out)["proof"]
    assert proof["samples"] == 3
    (shards,) = (path for path in tmp_path.iterdir() if path.name.count("-") == 2)  # rows-<content>-<places>
    assert len(proof_samples(base(), str(shards), 9)) == 5
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.tar").write_bytes(bytes(1024))
    with pytest.raises(ValueError, match="--verify .*none contains no sample; give shards or rows"):
        proof_samples(base(), str(tmp_path / "none"), 3)


def test_a_failed_proof_ends_with_3(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Use a tolerance of zero, so that a correct merge fails too."""
    monkeypatch.setattr("finetune.verify.merged._TYPICAL", {"F32": 0.0})
    assert main(["merge", str(base()), str(made / "adapter"), str(tmp_path / "out"), "--verify"]) == 3
    assert "FAILED" in capsys.readouterr().out


def test_a_longer_context_is_written_to_the_merged_config(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    trained = {"context": {"length": 6000, "yarn": {"factor": 2.0}}}
    save_file(load_file(file), file, metadata={"moetune.config": json.dumps(trained)})
    assert main(["merge", str(base()), str(tmp_path / "adapter"), str(tmp_path / "out"), "--verify"]) == 0
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert (text["max_position_embeddings"], text["rope_theta"]) == (6000, 5_000_000)
    assert (text["rope_scaling"]["rope_type"], text["rope_scaling"]["factor"]) == ("yarn", 2.0)
    config = cases.stock(tmp_path / "out").config.text_config
    assert (config.rope_parameters["rope_type"], config.rope_parameters["rope_theta"]) == ("yarn", 5_000_000)


FP8 = TinyModel(hidden=384, expert_hidden=128, experts=8, layers=2, heads=8, head_dim=64, dtype="bfloat16")


@pytest.mark.parametrize("wrong", ["", "not merged", "experts shifted", "a scale", "one code"])
def test_fp8_files_are_proved_by_their_codes(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(tmp_path / "base", FP8)
    cases.adapt(tmp_path / "base", tmp_path / "adapter")
    words = ["merge", *(str(tmp_path / name) for name in ("base", "adapter", "out")), "--dtype", "fp8"]
    if not wrong:
        assert main([*words, "--verify", "--json"]) == 0
        proof = json.loads(capsys.readouterr().out)["proof"]
        assert proof["codes"]["matrices"] == 2 * (4 + 2 * 8)
        assert proof["codes"]["apart"] < 1e-3 * proof["codes"]["values"]
        assert 0 < proof["kl"] < 0.5
        assert proof["stored"] == "BF16/F8_E4M3"
        return
    assert main(words) == 0
    plan = plan_merge(open_base(tmp_path / "base"), tmp_path / "adapter", dtype="fp8")
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    assert compare_codes(open_base(tmp_path / "out"), plan).sound
    if wrong == "not merged":
        write_tiny(tmp_path / "plain", replace(FP8, fp8="stacked"))
        tensors |= {key: t for key, t in load_file(tmp_path / "plain" / "model.safetensors").items() if name in key}
    elif wrong == "experts shifted":
        tensors |= {key: tensors[key].roll(1, 0) for key in (name, f"{name}_scale_inv")}
    elif wrong == "a scale":
        tensors[f"{name}_scale_inv"][3] *= 1.001
    else:
        tensors[name].view(torch.uint8)[2] ^= 2
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata=metadata)
    assert not compare_codes(open_base(tmp_path / "out"), plan).sound
