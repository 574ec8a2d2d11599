"""Merges of a base and an adapter: compared with stock PEFT and with numpy on the raw bytes, and their errors."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import base_variants as stored
import merge_cases as cases
import numpy as np
import pytest
import torch
from base_folders import write_base
from bases import base
from places import ROOT
from safetensors.torch import load_file, save_file
from tiny_moe import vl_model

from benchmarks.harness.memory import AnonymousPeak
from finetune.adapters.merge import Merged, merge, require_all
from finetune.adapters.merge_blocks import Realised
from finetune.adapters.merge_plan import check_room, plan_merge
from finetune.files.basefiles import open_base
from finetune.files.tiny import TinyModel, write_tiny
from launchers.cli import main

EXPERTS = 8


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter for the tiny base, and stock PEFT's logits with it."""
    folder = tmp_path_factory.mktemp("adapter")
    return folder, cases.logits(cases.adapt(base(), folder, full=True).eval())


def merged(base_folder: Path, adapter: Path, out: Path, **options: Any) -> Merged:
    return merge(plan_merge(open_base(base_folder), adapter), out, **options)


def whole(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A base that transformers can load: the tiny base's small files with these weights."""
    made = stored.folder_with(folder, base(), tensors)
    for path in base().iterdir():
        if path.suffix != ".safetensors" and path.is_file() and not (made / path.name).exists():
            shutil.copy(path, made)
    return made


@pytest.mark.parametrize("layout", ["hub", "memory", "per_expert"])
def test_the_merged_folder_is_base_plus_adapter_from_every_layout(
    layout: str, adapter: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    tensors = stored.weights(base())
    variant = {"hub": stored.hub(tensors), "memory": tensors, "per_expert": stored.per_expert(tensors)}[layout]
    report = merged(whole(tmp_path, variant), adapter[0], tmp_path / "out")
    assert report.intended == report.applied == len(report.changes) + len(report.full)
    assert len(report.full) == 2
    assert max(change.error for change in report.changes.values()) < 1e-5
    expected = cases.expected(
        {name: t.numpy() for name, t in stored.hub(tensors).items()}, cases.raw(adapter[0]), scale=1.5, experts=EXPERTS
    )
    got = cases.raw(tmp_path / "out")
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        assert np.abs(got[name] - values).max() <= 1e-6 * np.abs(values).max(), name
    ours = cases.logits(cases.stock(tmp_path / "out"))
    assert (ours - adapter[1]).abs().max() <= 1e-5 * adapter[1].abs().max()
    assert (cases.logits(cases.stock(base())) - adapter[1]).abs().max() > 1e-2 * adapter[1].abs().max()


def test_bfloat16_is_rounded_once_and_the_loss_is_reported(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", TinyModel(dtype="bfloat16", shard_bytes=60_000))
    cases.adapt(tmp_path / "base", tmp_path / "adapter", size=0.004)
    report = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    before, after = cases.raw(tmp_path / "base"), cases.raw(tmp_path / "out")
    expected = cases.expected(before, cases.raw(tmp_path / "adapter"), scale=1.5, experts=EXPERTS)
    assert {f"{name}.bits" for name in expected} < after.keys()
    for name, values in expected.items():
        bits, ideal = after[f"{name}.bits"], cases.rounded(values)
        # a sum halfway between two values in float64 may round to the other one in float32
        assert np.abs(bits.astype(int) - ideal.astype(int)).max() <= 1, name
        assert (bits != ideal).mean() < 1e-3, name
        if name in report.changes:
            change = values - before[name]
            realised = after[name].astype(np.float64) - before[name]
            error = np.linalg.norm(realised - change) / np.linalg.norm(change)
            assert report.changes[name].error == pytest.approx(error, rel=1e-2)
            assert report.changes[name].unchanged == pytest.approx((realised == 0).sum(), rel=1e-2)
            assert report.changes[name].intended == pytest.approx(np.linalg.norm(change), rel=1e-4)
    worst = max(change.error for change in report.changes.values())
    assert 0.05 < worst < 1, "such a small change loses much in bfloat16"
    assert f"{worst:.2%} off" in "\n".join(report.lines())


@pytest.mark.parametrize(
    "dims",
    [{"hidden": 80}, {"experts": 4}, {"hidden": 80, "experts": 4}, {"hidden": 40}],
    ids=["H=2F", "E=r", "H=2F,E=r", "H=F"],
)
def test_equal_dimensions_confuse_nothing(dims: dict[str, int], tmp_path: Path) -> None:
    write_base(vl_model(**dims), tmp_path / "base")
    cases.adapt(tmp_path / "base", tmp_path / "adapter")
    merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    expected = cases.expected(
        cases.raw(tmp_path / "base"), cases.raw(tmp_path / "adapter"), scale=1.5, experts=dims.get("experts", 12)
    )
    got = cases.raw(tmp_path / "out")
    for name, values in expected.items():
        assert np.abs(got[name] - values).max() <= 1e-6 * np.abs(values).max(), name


def test_a_dense_base_with_a_tied_head(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", TinyModel(experts=None, tied=True, shard_bytes=60_000))
    expected = cases.logits(cases.adapt(tmp_path / "base", tmp_path / "adapter", dense=True).eval())
    report = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", jobs=3)
    ours = cases.logits(cases.stock(tmp_path / "out"))
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert report.applied == len(report.changes)
    names = {path.name for path in (tmp_path / "base").glob("*.safetensors*")}
    assert names == {path.name for path in (tmp_path / "out").glob("*.safetensors*")}
    assert len(names) > 2


def test_all_small_files_are_copied_and_every_file_has_a_checksum(
    adapter: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(base()), str(adapter[0]), str(tmp_path / "out"), "--json"]) == 0
    output = capsys.readouterr()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in base().iterdir()} | {"checksums.sha256", "moetune-merge.json"}
    lines = (tmp_path / "out" / "checksums.sha256").read_text().splitlines()
    assert {line[66:] for line in lines} == names - {"checksums.sha256"}
    for line in lines:
        assert hashlib.sha256((tmp_path / "out" / line[66:]).read_bytes()).hexdigest() == line[:64]
    report = json.loads((tmp_path / "out" / "moetune-merge.json").read_text())
    counted = json.loads(output.out)
    assert counted["intended"] == counted["applied"] == report["applied"] == len(report["changes"]) + 2
    assert all(change["intended_norm"] > 0 for change in report["changes"].values())
    assert "does not say which base" in report["origin"]
    plan, *done = output.err.splitlines()[2:]
    assert plan.startswith(f"out      {tmp_path / 'out'}: 1 weight file and ")
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir() if path.suffix == ".safetensors")
    assert f" {size:,} bytes" not in plan, "the small files count too"
    assert any(line.startswith("applied") for line in done)


def test_weight_files_have_the_size_that_was_asked_for(
    adapter: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged(base(), adapter[0], tmp_path / "one")
    words = ["merge", str(base()), str(adapter[0]), str(tmp_path / "many"), "--shard-bytes"]
    assert main([*words, "200000"]) == 0
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    assert all(len(load_file(file)) == 1 or file.stat().st_size < 210_000 for file in files)
    one, many = cases.raw(tmp_path / "one"), cases.raw(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)
    ours = cases.logits(cases.stock(tmp_path / "many"))
    assert (ours - adapter[1]).abs().max() <= 1e-5 * adapter[1].abs().max()
    capsys.readouterr()
    assert main([*words, "0"]) == 2
    assert "--shard-bytes is 0; it must be a number from 1 on" in capsys.readouterr().err


def test_a_plan_writes_nothing(adapter: tuple[Path, torch.Tensor], tmp_path: Path, capsys: Any) -> None:
    assert main(["merge", str(base()), str(adapter[0]), str(tmp_path / "out"), "--plan"]) == 0
    assert "free there: " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_base_is_refused_and_both_are_named(
    adapter: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.adapters.provenance import Provenance

    shutil.copytree(adapter[0], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    metadata = Provenance(base=open_base(base()), base_name="hub/tiny").metadata()
    save_file(load_file(file), file, metadata=metadata)
    write_tiny(tmp_path / "other", TinyModel(seed=1))
    words = ["merge", str(tmp_path / "other"), str(tmp_path / "adapter"), str(tmp_path / "out")]
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert "was trained on hub/tiny (fingerprint " in errors
    assert f"but {tmp_path / 'other'} is another base (fingerprint " in errors
    assert not (tmp_path / "out").exists()
    assert main([*words, "--other-base"]) == 0
    assert "merged into another base on purpose" in capsys.readouterr().out
    assert main(["merge", str(base()), str(tmp_path / "adapter"), str(tmp_path / "same")]) == 0
    assert "was trained on this base" in capsys.readouterr().out


def test_zero_changes_and_values_that_are_not_finite_leave_no_folder(
    adapter: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    shutil.copytree(adapter[0], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    zero = {name: tensor * (".lora_B." not in name) for name, tensor in tensors.items() if ".lora_" in name}
    save_file(zero, file)
    with pytest.raises(ValueError, match="changes nothing: every lora_B in it is zero"):
        plan_merge(open_base(base()), tmp_path / "adapter")
    for name, text in (
        ("layers.1.mlp.experts.lora_B", "down_proj: base plus adapter is not finite"),
        ("merger.norm.weight", "merger.norm.weight: the adapter holds NaN"),
    ):
        broken = {key: tensor.clone() for key, tensor in tensors.items()}
        (key,) = (key for key in broken if key.endswith((name, name + ".weight")) and "list" not in key)
        broken[key].view(-1)[3] = float("nan")
        save_file(broken, file)
        with pytest.raises(ValueError, match=text):
            merged(base(), tmp_path / "adapter", tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_a_change_that_bfloat16_loses_completely_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path / "base", TinyModel(dtype="bfloat16"))
    cases.adapt(tmp_path / "base", tmp_path / "adapter", size=1e-7)
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 3
    assert re.search(r"LOST     \d+ of the changes were lost in rounding, first ", capsys.readouterr().out)


def test_a_skipped_change_is_an_error(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    plan = plan_merge(open_base(base()), adapter[0])
    report = merge(plan, tmp_path / "out")
    require_all(plan, report)
    first = next(iter(report.changes))
    for less in (
        replace(report, changes={name: report.changes[name] for name in list(report.changes)[1:]}),
        replace(report, changes={**report.changes, first: Realised(values=5)}),
    ):
        with pytest.raises(ValueError, match=f"1 of {plan.intended} changes were not applied, first {first}; nothing"):
            require_all(plan, less)
    with pytest.raises(ValueError, match=r"2 of .* were not applied, first model.visual.merger.norm"):
        require_all(plan, replace(report, full=()))


def test_a_base_that_is_truncated_while_it_is_read(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    shutil.copytree(base(), tmp_path / "base")
    plan = plan_merge(open_base(tmp_path / "base"), adapter[0])
    os.truncate(tmp_path / "base" / "model.safetensors", 100_000)
    with pytest.raises(ValueError, match="ends early: the base was cut off|cut off while it was being read"):
        merge(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lack_of_space_is_reported_before_anything_is_written(
    adapter: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_merge(open_base(base()), adapter[0])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=plan.need_bytes - 1))
    with pytest.raises(OSError, match=rf"needs {plan.need_bytes:,} bytes, but .* has only {plan.need_bytes - 1:,}"):
        merge(plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=plan.need_bytes))
    check_room(plan, tmp_path / "out")


def test_an_exceeded_quota_is_reported_immediately(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    """A limit on file sizes stands in for a disk that fills up although it seemed to have space."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from launchers.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["merge", str(base()), str(adapter[0]), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_merge_killed_at_any_time_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", TinyModel(hidden=160, experts=16, expert_hidden=96, shard_bytes=2_000_000))
    cases.adapt(tmp_path / "base", tmp_path / "adapter")
    out = tmp_path / "out"
    script = (
        "import sys; from pathlib import Path; from finetune.files.basefiles import open_base\n"
        "from finetune.adapters.merge import merge; from finetune.adapters.merge_plan import plan_merge\n"
        "base, adapter, out = map(Path, sys.argv[1:])\n"
        "plan = plan_merge(open_base(base), adapter)\n"
        "while True:\n"
        "    print('go', flush=True); sys.stdin.readline(); merge(plan, out, jobs=1); print('done', flush=True)\n"
        "    sys.stdin.readline()"
    )
    line = [sys.executable, "-c", script, str(tmp_path / "base"), str(tmp_path / "adapter"), str(out)]
    cut = 0
    for delay in (0.0, 0.01, 0.03, 0.06):
        with subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "go\n"
            process.stdin.write("\n")
            process.stdin.flush()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        if out.exists():  # the merge was faster than the signal: the folder must be complete
            require_whole(out)
            shutil.rmtree(out)
            continue
        cut += 1
        left = tmp_path / "out.partial"
        assert not (left / "config.json").exists() or (left / "checksums.sha256").exists()
        with pytest.raises(ValueError, match="No such file|there is no|lacks|holds no weights"):
            open_base(out)
    assert cut
    merged(tmp_path / "base", tmp_path / "adapter", out)
    require_whole(out)
    assert not (tmp_path / "out.partial").exists()


def require_whole(folder: Path) -> None:
    for line in (folder / "checksums.sha256").read_text().splitlines():
        assert hashlib.sha256((folder / line[66:]).read_bytes()).hexdigest() == line[:64]
    open_base(folder)


def test_memory_is_a_few_times_the_largest_tensor_for_any_base(tmp_path: Path) -> None:
    model = TinyModel(hidden=256, experts=32, expert_hidden=160, layers=6, shard_bytes=30_000_000)
    size = write_tiny(tmp_path / "base", model).weight_bytes
    cases.adapt(tmp_path / "base", tmp_path / "adapter")
    base_files = open_base(tmp_path / "base")
    largest = max(tensor.size for tensor in base_files.stored.values())
    plan = plan_merge(base_files, tmp_path / "adapter")
    with AnonymousPeak() as memory:
        merge(plan, tmp_path / "out", jobs=2)
    assert size > 8 * largest
    assert memory.peak_bytes < 3 * largest


def test_impossible_requests_are_refused_before_the_merge_starts(
    adapter: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "base"
    shutil.copytree(base(), own)
    (tmp_path / "link").symlink_to(own)
    for words, message in (
        ([str(tmp_path / "link" / "merged")], "merged lies inside the base"),
        ([str(tmp_path / "out"), "--jobs", "-1"], "--jobs must be at least 0, got -1"),
        ([str(tmp_path / "out"), "--verify", "--samples", "0"], "--samples must be at least 1, got 0"),
        ([str(tmp_path / "out"), "--verify", "--device", "cuda:99"], "--device is cuda:99, but torch sees"),
        ([str(tmp_path / "out"), "--verify", "--device", "gpu"], "--device is 'gpu'; use cpu, cuda"),
        ([str(tmp_path / "out"), "--verify", "nowhere.jsonl"], "'nowhere.jsonl', which does not exist"),
    ):
        assert main(["merge", str(own), str(adapter[0]), *words]) == 2
        assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"base", "link"}
    assert {path.name for path in own.iterdir()} == {path.name for path in base().iterdir()}
    assert main(["verify-base", str(own), "--device", "cuda:99"]) == 2
