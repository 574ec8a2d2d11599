"""A merged folder prepares images and videos as in training; transformers' own processors are the reference."""

import argparse
import json
import shutil
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import merge_cases as cases
import numpy as np
import oracle
import pytest
import torch
from bases import base
from media_files import clip, decode_all, encode, moving, picture
from PIL import Image
from safetensors.torch import load_file, save_file

from data.config import ChatConfig, DataConfig, ImageConfig, VideoConfig
from data.format.record import parse_record
from data.render.sample import Renderer
from finetune.adapters.combine import combine
from finetune.adapters.export import export
from finetune.adapters.media import HEADING, rules_of, trained_rules
from finetune.adapters.merge import merge
from finetune.adapters.merge_plan import merge_settings, plan_merge
from finetune.files.basefiles import open_base
from finetune.verify.merged import proof_samples, prove
from launchers.arguments import answer_config, model_arguments
from launchers.cli import main

WEIGHTS, IMAGE_FILE, VIDEO_FILE = (
    "adapter_model.safetensors",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
SMALL = DataConfig(
    image=ImageConfig(min_tokens=6, max_tokens=20),
    video=VideoConfig(fps=3.5, min_frames=2, max_frames=6, min_tokens=4, max_tokens=40, max_tokens_per_frame=5),
)
CASES = {
    "small": SMALL,
    "uncapped": replace(SMALL, video=replace(SMALL.video, frame_cap=False)),
    "large images": DataConfig(image=ImageConfig(min_tokens=80)),
    "frames": DataConfig(video=VideoConfig(fps=4, max_frames=9)),
}


@cache
def video() -> bytes:
    return clip(moving(75, 96, 160), rate=30)


def ours(folder: Path, data: DataConfig) -> tuple[list[Any], list[Any]]:
    """Our grids for a picture and the video."""
    record = parse_record(
        {
            "v": 1,
            "messages": [{"role": "user", "content": "<image><video>"}, {"role": "assistant", "content": "Yes."}],
            "images": ["0.png"],
            "videos": ["0.mp4"],
        },
        shard="",
        key="0",
    )
    renderer = Renderer(folder, image=data.image, video=data.video, chat=ChatConfig())
    sample = renderer.build(record, [encode(Image.fromarray(picture(200, 320)))], [video()], key="0")
    return sample.image_grids.tolist(), sample.video_grids.tolist()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    cases.adapt(base(), folder)
    return folder


def trained(plain: Path, folder: Path, data: DataConfig) -> Path:
    """A copy of the adapter as if it had been trained with this `data:`."""
    shutil.copytree(plain, folder)
    settings = {"data": asdict(data) | {"workers": 7}, "optim": {"lr": 1.0}}
    save_file(load_file(plain / WEIGHTS), folder / WEIGHTS, metadata={"moetune.config": json.dumps(settings)})
    return folder


def nested(folder: Path) -> Path:
    """The tiny base with the one processor file that transformers 5 saves."""
    shutil.copytree(base(), folder)
    sections = {
        name: json.loads((folder / file).read_text())
        for name, file in (("image_processor", IMAGE_FILE), ("video_processor", VIDEO_FILE))
    }
    sections["image_processor"] |= {"min_pixels": 65536}
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen3VLProcessor", **sections}))
    return folder


@pytest.mark.parametrize(("name", "files"), [*((name, "own") for name in CASES), ("small", "nested")])
def test_transformers_computes_the_grids_of_training_from_a_merged_folder(
    name: str, files: str, plain: Path, tmp_path: Path
) -> None:
    data = CASES[name]
    start = base() if files == "own" else nested(tmp_path / "base")
    plan = plan_merge(open_base(start), trained(plain, tmp_path / "adapter", data))
    merge(plan, tmp_path / "out")
    wanted = ours(start, data)
    assert wanted != ours(start, DataConfig()), "the settings change something"
    frames = np.stack(decode_all(video()))
    judged = oracle.ask(
        oracle.grids, folder=str(tmp_path / "out"), pictures=[picture(200, 320)], frames=frames, rate=30.0
    )
    assert judged == wanted
    assert rules_of(tmp_path / "out") == trained_rules(start, data)
    assert not trained_rules(start, data).differences(rules_of(tmp_path / "out"))
    again = merge(plan_merge(open_base(tmp_path / "out"), plan.source.folder, other_base=True), tmp_path / "again")
    assert (again.folder / "README.md").read_text() == (tmp_path / "out" / "README.md").read_text()


def test_default_limits_change_no_file(plain: Path, tmp_path: Path) -> None:
    for number, adapter in enumerate([plain, trained(plain, tmp_path / "default", DataConfig())]):
        out = tmp_path / f"{number}"
        merge(plan_merge(open_base(base()), adapter), out)
        for file in (IMAGE_FILE, VIDEO_FILE):
            assert (out / file).read_bytes() == (base() / file).read_bytes()
        assert not (out / "README.md").exists()


def test_only_the_file_that_must_change_changes(plain: Path, tmp_path: Path) -> None:
    merge(plan_merge(open_base(base()), trained(plain, tmp_path / "a", CASES["large images"])), tmp_path / "out")
    assert (tmp_path / "out" / VIDEO_FILE).read_bytes() == (base() / VIDEO_FILE).read_bytes()
    before, after = (json.loads((folder / IMAGE_FILE).read_text()) for folder in (base(), tmp_path / "out"))
    assert after.pop("size") == {"shortest_edge": 80 * 1024, "longest_edge": before.pop("size")["longest_edge"]}
    assert after == before


def test_settings_that_no_file_can_express_are_in_the_readme(plain: Path, tmp_path: Path) -> None:
    data = DataConfig(video=VideoConfig(timestamps="hms", single_frame="refuse", frame_cap=False))
    adapter = trained(plain, tmp_path / "adapter", data)
    start = tmp_path / "base"
    shutil.copytree(base(), start)
    (start / "README.md").write_text("# The base\n\nIts own words.\n")
    merge(plan_merge(open_base(start), adapter), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith(f"# The base\n\nIts own words.\n\n{HEADING}")
    for line in (
        "`data.video.timestamps`: hms (no file can say this",
        "single_frame`: refuse (no file",
        "frame_cap`: False",
    ):
        assert line in text
    export(adapter, tmp_path / "exported", form="peft")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"{HEADING}\n- `data.video.frame_cap`: False" in card
    assert "## What reads it" in card


def test_verify_and_ask_use_the_media_settings_of_training(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained(plain, tmp_path / "adapter", replace(SMALL, video=replace(SMALL.video, timestamps="hms")))
    Image.fromarray(picture(200, 320)).save(tmp_path / "0.png")
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "This."}]
    rows.write_text(json.dumps({"messages": turns, "images": ["0.png"]}) + "\n")
    words = ["merge", str(base()), str(adapter), str(tmp_path / "out"), "--verify", str(rows), "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["proof"]["media"] == []
    (sample,) = proof_samples(base(), str(rows), 1, data=SMALL)
    assert sample.sample.image_grids.tolist() == ours(base(), SMALL)[0]
    parser = argparse.ArgumentParser()
    model_arguments(parser)
    asked = answer_config(parser.parse_args([]), str(tmp_path / "out"))
    assert asked.data == DataConfig(image=SMALL.image, video=replace(SMALL.video, timestamps="hms"))
    assert ours(tmp_path / "out", asked.data) == ours(base(), SMALL)
    plan = plan_merge(open_base(base()), adapter)
    shutil.copy(base() / IMAGE_FILE, tmp_path / "out")
    proof = prove(tmp_path / "out", plan, proof_samples(base(), "", 0)[:1], device="cpu")
    assert not proof.passed
    assert "the processor files say image_pixels 65,536 to 16,777,216, not 6,144 to 20,480" in proof.line()


def test_a_sum_keeps_the_settings_that_its_adapters_share(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = (
        trained(plain, tmp_path / name, data) for name, data in zip("abc", [SMALL, SMALL, DataConfig()], strict=True)
    )
    combine({a: 0.5, b: 0.5}, tmp_path / "alike")
    assert plan_merge(open_base(base()), tmp_path / "alike").data == SMALL
    combine({a: 0.5, c: 0.5}, tmp_path / "other")
    assert plan_merge(open_base(base()), tmp_path / "other").data is None
    assert main(["combine", str(tmp_path / "d"), f"{a}=0.5", f"{c}=0.5"]) == 0
    assert "note: the adapters differ in data.image" in capsys.readouterr().out
    assert torch.equal(
        *(load_file(tmp_path / x / WEIGHTS)[next(iter(load_file(a / WEIGHTS)))] for x in ("alike", "other"))
    )


def test_a_damaged_merge_report_is_named(tmp_path: Path) -> None:
    (tmp_path / "moetune-merge.json").write_text('{"trained_with": [1]}')
    with pytest.raises(ValueError, match=r"moetune-merge.json: trained_with is '\[1\]'; it must be an object"):
        merge_settings(tmp_path)
