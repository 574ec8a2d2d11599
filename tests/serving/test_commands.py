"""Flags for servers where a folder's own files are silent, and the reason why a server cannot take an adapter."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from adapter_cases import WIDE, drawn_adapter
from bases import base

from data.config import DataConfig, ImageConfig, VideoConfig
from finetune.adapters.media import processor_files
from finetune.architecture.families import family
from finetune.config import RouterPartConfig
from finetune.serving.commands import Served, command, find_served, obstacles
from finetune.serving.memory import server_memory
from launchers.cli import main

TRAINED = {
    "data": {"image": {"min_tokens": 4, "max_tokens": 20}, "video": {"fps": 4.0, "max_frames": 6, "max_tokens": 40}},
    "context": {"yarn": {"factor": 2.0}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: LoRA on attention, experts and the tower, with limits and a context of its own."""
    folder = tmp_path_factory.mktemp("run")
    lora = replace(WIDE, router=RouterPartConfig(mode="frozen"))
    drawn_adapter(folder / "adapter", lora, TRAINED)
    return folder


def flags(words: list[str]) -> dict[str, str]:
    return {word: following for word, following in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}


def test_an_adapter_is_served_with_the_limits_and_the_context_of_training(run: Path) -> None:
    served = find_served(run, name="mine")
    told = flags(command(served, "vllm", port=8000))
    assert (served.model, told["--max-model-len"], served.length) == (base(), "8192", 8192)
    assert (told["--lora-modules"], told["--max-lora-rank"]) == (f"mine={run / 'adapter'}", "8")
    assert "--enable-tower-connector-lora" in told
    rope = json.loads(told["--hf-overrides"])["text_config"]["rope_parameters"]
    assert (rope["factor"], rope["original_max_position_embeddings"]) == (2.0, 4096)
    assert json.loads(told["--media-io-kwargs"]) == {"video": {"fps": 4.0, "min_frames": 4, "max_frames": 6}}
    told_limits = json.loads(told["--mm-processor-kwargs"])
    image, video = ImageConfig(**TRAINED["data"]["image"]), VideoConfig(**TRAINED["data"]["video"])
    files = processor_files(base(), DataConfig(image=image, video=video))
    images, videos = (json.loads(files[f"{kind}preprocessor_config.json"]) for kind in ("", "video_"))
    assert told_limits["images_kwargs"]["size"] == images["size"]
    assert told_limits["videos_kwargs"]["size"] == videos["size"]
    assert {key: videos[key] for key in ("fps", "max_frames")}.items() <= told_limits["videos_kwargs"].items()
    assert find_served(run / "adapter", name="mine") == find_served(base(), run / "adapter", name="mine") == served


def test_a_model_folder_says_the_rest_itself() -> None:
    words = command(find_served(base(), name="mine"), "vllm", port=8000, length=512, dtype="float32")
    told = flags(words)
    assert words[:3] == ["vllm", "serve", str(base())]
    assert (told["--served-model-name"], told["--max-model-len"]) == ("mine", "512")
    assert told["--dtype"] == "float32"
    assert not {"--enable-lora", "--mm-processor-kwargs", "--media-io-kwargs", "--hf-overrides"} & told.keys()


def test_what_a_server_cannot_take_is_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    router = drawn_adapter(tmp_path / "router", replace(WIDE, router=RouterPartConfig(mode="lora")))
    full = drawn_adapter(tmp_path / "full", WIDE)
    on_router, in_full = (obstacles(find_served(folder, name="m"), "vllm") for folder in (router, full))
    tower = "vllm 0.32 leaves out an adapter on the tower's attn.qkv if the model has experts"
    assert on_router == ["it is not proved that vllm computes an adapter on routers", tower]
    assert in_full == ["vllm takes no tensor in full, and the adapter holds 3", tower]
    assert obstacles(find_served(full, name="m"), "transformers") == []
    assert main(["serve", str(full)]) == 0
    shown = capsys.readouterr().out
    assert f"moetune merge {base()} {full} merged\n  moetune serve merged" in shown
    assert re.search(rf"python -m finetune.serving.stock .* --adapter {full}", shown)
    assert main(["serve", str(full), "--server", "sglang"]) == 3


def test_the_memory_of_a_server_decides_how_many_gpus(tmp_path: Path) -> None:
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        shutil.copy(base() / name, tmp_path)
    big = Served(model=tmp_path, adapter=None, name="m", family=family("qwen3-vl-30b-a3b"), context=None, data=None)
    one = server_memory(big, kind="h200-141gb", length=10_000)
    assert (one.gpus, one.weights) == (1, pytest.approx(62.1e9, rel=0.01))
    assert one.conversation == 10_000 * 48 * 2 * 4 * 128 * 2
    free = 0.9 * one.gpu.memory_bytes - one.weights - one.at_work - one.reserve
    assert one.conversations == int(free // one.conversation) > 50
    assert one.flags("vllm") == ["--gpu-memory-utilization", "0.9"]
    eight = server_memory(big, kind="a100-40gb")
    assert (eight.gpus, eight.weights, eight.length) == (4, one.weights // 4, 262_144)
    assert eight.conversation == 262_144 * 48 * 2 * 1 * 128 * 2  # each of four GPUs has one of the four heads
    assert eight.flags("sglang")[:3] == ["--tp", "4", "--mem-fraction-static"]
    assert 0.5 < float(eight.flags("sglang")[3]) < 0.9
    assert not eight.suits("transformers")
    with pytest.raises(ValueError, match="even 32 of them.*cannot hold the model and one conversation of 90,000,000"):
        server_memory(big, kind="a100-40gb", length=90_000_000)


def test_the_plan_is_printed_with_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(base()), "--gpu", "l40s-48gb"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^memory of each of 1 x l40s-48gb\n  weights +\d+\.\d\d MB", shown)
    assert re.search(r"a server may use +43.00 GB: [\d,]+ conversations at a time", shown)
    assert re.search(r"vllm serve .* --gpu-memory-utilization 0.9$", shown, re.MULTILINE)


def test_what_cannot_be_served_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Path) -> None:
    for words, message in (
        ([str(tmp_path)], "is neither a run with an adapter or a model, nor a model folder, nor an adapter's"),
        ([str(run), "--run"], f"{run} names no held-out samples (eval.sources of a run): give some with --data"),
        ([str(base()), "--run", "--server", "sglang", "--data", "x"], "--run found none of sglang that takes it"),
        ([str(base()), "--gpu", "abacus"], "'abacus' is not in the table"),
    ):
        assert main(["serve", *words]) == 2
        assert message in capsys.readouterr().err
