"""Answers of a loaded model equal those of transformers' own pipeline on the same media, alone and in batches."""

import argparse
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from adapter_cases import WIDE, drawn_adapter
from bases import base
from mixes import asked, files, media, record
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from data.config import DataConfig, ImageConfig
from data.render.vision import read_spec
from finetune.adapters.keys import WEIGHTS
from finetune.ask.open_model import open_speaker
from finetune.ask.speaker import Sampling, Speaker
from finetune.config import RouterPartConfig, RunConfig
from finetune.files.tiny import TinyModel, write_tiny
from launchers.arguments import load_speaker
from launchers.ask import question
from launchers.cli import main

SHORT = Sampling(max_tokens=10)
ASKED = ["text", "image", "images in between", "range", "image and videos"]


@cache
def speaker() -> Speaker:
    return open_speaker(str(base()))


@cache
def stock() -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(base(), dtype=torch.float32).eval()


def prompt(name, by=None):
    """Return the mix without its last answer, as in a request to a server."""
    of = record(name)
    assert of.messages[-1].role == "assistant"
    return (by or speaker()).renderer.build(replace(of, messages=of.messages[:-1]), *files(of), key=name, prompt=True)


def theirs(name):
    """Return transformers' inputs for the same media."""
    question = asked(name)
    question["messages"] = question["messages"][:-1]
    arrays = oracle.ask(oracle.conversation, folder=str(base()), prompt=True, **question)
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


@pytest.mark.parametrize("name", ASKED)
def test_ids_pixels_and_greedy_text_are_transformers_own(name):
    inputs, ours = theirs(name), prompt(name)
    np.testing.assert_array_equal(ours.input_ids, inputs["input_ids"][0])
    fed = speaker()._inputs([ours])
    for key in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"):
        assert (key in fed) == (key in inputs), key
        assert key not in fed or torch.equal(fed[key], inputs[key].to(fed[key].dtype)), key
    with torch.no_grad():
        written = stock().generate(
            **inputs, do_sample=False, max_new_tokens=10, top_k=None, top_p=None, temperature=None
        )
    (answer,) = speaker().answer([ours], SHORT)
    wanted = [token for token in written[0, inputs["input_ids"].shape[1] :].tolist() if token not in speaker().stops]
    assert list(answer.ids) == wanted
    assert answer.text == speaker().renderer.decode(wanted) == "".join(speaker().stream(ours, SHORT))


def test_a_batch_answers_as_each_prompt_alone():
    prompts = [prompt(name) for name in (*ASKED, "tools")]
    together = speaker().answer(prompts, SHORT)
    alone = [speaker().answer([one], SHORT)[0] for one in prompts]
    assert together == alone
    assert len({answer.ids for answer in alone}) > 3  # answers depend on their prompts
    hot = Sampling(max_tokens=6, temperature=1.5, seed=3)
    sampled = speaker().answer(prompts, hot)
    assert sampled[2] == speaker().answer(prompts[2:3], hot, numbers=[2])[0]
    assert sampled != speaker().answer(prompts, replace(hot, seed=4))
    assert {len(answer.ids) for answer in sampled} == {6}


def test_streaming_leaves_no_inference_mode_on():
    for _ in speaker().stream(prompt("image"), SHORT):
        assert not torch.is_inference_mode_enabled()


def test_files_on_the_command_line_become_the_same_prompt(tmp_path: Path):
    """Placeholders may be given at the start, as transformers' users write them, or left out."""
    for name in ("0.png", "1.jpg", "3.mp4"):
        (tmp_path / name).write_bytes(media()[name])
    wanted = prompt("video")
    for text in ("<video>\nWhat moves?", "\nWhat moves?"):
        of, images, videos = question(text, [], [str(tmp_path / "3.mp4")])
        built = speaker().renderer.build(of, images, videos, key="", prompt=True)
        np.testing.assert_array_equal(built.input_ids, wanted.input_ids)
        np.testing.assert_array_equal(built.video_patches, wanted.video_patches)
    files = [str(tmp_path / name) for name in ("0.png", "1.jpg")]
    of, images, _ = question("Compare <image> with <image>.", files, [], system="Be brief.")
    assert [message.role for message in of.messages] == ["system", "user"]
    assert images == [media()["0.png"], media()["1.jpg"]]


def test_log_probabilities_are_those_of_a_whole_forward():
    inputs, ours = theirs("image and videos"), prompt("image and videos")
    continuation = [5, 300, 17, 41]
    judged = speaker().judge(ours, continuation)
    more = {
        "input_ids": torch.cat([inputs["input_ids"], torch.tensor([continuation])], dim=1),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, 4, dtype=torch.int64)], dim=1),
        "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + 4, dtype=torch.int64),
    }
    with torch.no_grad():
        logits = stock()(**inputs | more).logits[0, -5:-1]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])[:, 0]
    assert [one.chosen for one in judged] == pytest.approx(wanted.tolist(), abs=1e-4)
    best = logits.log_softmax(-1).max(-1)
    assert [one.best for one in judged] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert [one.best_id for one in judged] == best.indices.tolist()


def best_of_peft(adapter: Path):
    """Return the five most likely first tokens of stock PEFT, and their log-probabilities."""
    plain = AutoModelForImageTextToText.from_pretrained(base(), dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(plain, adapter).eval()(**theirs("image")).logits[0, -1].log_softmax(-1).topk(5)


def firsts(ours: Speaker, tokens) -> list[float]:
    return [ours.judge(prompt("image", ours), [token])[0].chosen for token in tokens.tolist()]


def test_an_adapter_on_its_base_answers_as_stock_peft_does(tmp_path: Path):
    """Test dense, expert and full parts together, then the same file without our metadata, as from another tool."""
    adapter = drawn_adapter(tmp_path / "adapter", WIDE)
    best = best_of_peft(adapter)
    ours = open_speaker(str(base()), adapter=adapter)
    assert firsts(ours, best.indices) == pytest.approx(best.values.tolist(), abs=1e-4)
    assert ours.answer([prompt("image", ours)], SHORT) != speaker().answer([prompt("image")], SHORT)
    assert not ours.switches
    save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS)
    added = open_speaker(str(base()), adapter=adapter)
    assert firsts(added, best.indices) == pytest.approx(best.values.tolist(), abs=1e-4)


def test_without_its_adapter_the_model_is_its_base(tmp_path: Path):
    small = {"data": {"image": {"min_tokens": 4, "max_tokens": 20}, "workers": 7}, "optim": {"lr": 1.0}}
    adapter = drawn_adapter(tmp_path / "adapter", replace(WIDE, router=RouterPartConfig(mode="lora")), small)
    ours = open_speaker(str(base()), adapter=adapter)
    asked, wanted = prompt("image", ours), speaker().answer([prompt("image")], SHORT)
    assert ours.switches
    with ours.base_alone():
        assert ours.answer([asked], SHORT) == wanted
    assert ours.answer([asked], SHORT) != wanted


def test_ask_compares_and_takes_the_settings_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = {"data": {"image": {"min_tokens": 4, "max_tokens": 20}, "workers": 7}, "optim": {"lr": 1.0}}
    lora = drawn_adapter(tmp_path / "lora", replace(WIDE, router=RouterPartConfig(mode="lora")), small)
    full = drawn_adapter(tmp_path / "full", WIDE)
    (tmp_path / "0.png").write_bytes(media()["0.png"])
    words = ["ask", str(base()), "What?", "--image", str(tmp_path / "0.png"), "--max-tokens", "4"]

    def answers(*more: str) -> dict[str, str]:
        assert main([*words, *more, "--json"]) == 0
        return {one["who"]: one["answer"] for one in json.loads(capsys.readouterr().out)["answers"]}

    size = ["--set", "data.image.min_tokens=4", "--set", "data.image.max_tokens=20"]
    plain, small_plain = answers()["model"], answers(*size)["model"]
    assert plain != small_plain
    both = answers("--adapter", str(lora), "--compare")
    assert both["base"] == small_plain
    assert both["adapted"] != small_plain
    assert answers("--adapter", str(full), "--compare")["base"] == plain
    assert main([*words, "--adapter", str(lora), "--compare"]) == 0
    assert capsys.readouterr().out == f"base:\n{both['base']}\nadapted:\n{both['adapted']}\n"


def test_an_adapter_trained_on_a_stretched_context_is_asked_on_it(tmp_path: Path):
    adapter = drawn_adapter(tmp_path / "adapter", WIDE, {"context": {"yarn": {"factor": 2.0}}})
    arguments = argparse.Namespace(
        adapter=adapter, settings=[], config="", device="cpu", dtype="auto", layout="auto", other_base=False
    )
    stretched = load_speaker(str(base()), arguments, adapter=adapter)
    assert stretched.module.config.text_config.rope_parameters["rope_type"] == "yarn"
    assert speaker().module.config.text_config.rope_parameters["rope_type"] == "default"


def test_an_adapter_trained_beside_quantised_experts_is_asked_beside_them(tmp_path: Path):
    adapter = drawn_adapter(tmp_path / "adapter", WIDE, {"model": {"quantise": {"experts": "nf4", "dense": "none"}}})
    assert "experts in nf4; merging adds the change to the base as published" in (adapter / "README.md").read_text()
    common = {"config": "", "device": "cpu", "dtype": "auto", "layout": "auto", "other_base": False}

    def stack(*settings: str) -> torch.Tensor:
        arguments = argparse.Namespace(adapter=adapter, settings=list(settings), **common)
        loaded = load_speaker(str(base()), arguments, adapter=adapter)
        return loaded.module.model.language_model.layers[0].mlp.experts.gate_up

    assert stack().dtype == torch.uint8
    assert stack("model.quantise.experts=none").dtype == torch.float32
    save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS)  # as from another tool
    with pytest.raises(ValueError, match=r"adapter is another tool's adapter, .*Set model.quantise.experts=none"):
        stack("model.quantise.experts=int8")


def test_an_adapter_of_another_base_is_refused_with_both_named(tmp_path: Path):
    adapter = drawn_adapter(tmp_path / "adapter", WIDE)
    write_tiny(tmp_path / "other", TinyModel(seed=5))
    with pytest.raises(ValueError, match=r"adapter was trained on .*base .*but .*other is another base"):
        open_speaker(str(tmp_path / "other"), adapter=adapter)
    assert open_speaker(str(tmp_path / "other"), adapter=adapter, other_base=True).stops


def test_image_settings_reach_the_prompt():
    small = open_speaker(str(base()), config=RunConfig(data=DataConfig(image=ImageConfig(min_tokens=4, max_tokens=20))))
    assert len(prompt("image", small).input_ids) < len(prompt("image").input_ids)


def test_an_unknown_device_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["ask", str(base()), "?", "--device", "gpu"]) == 2
    assert (
        "--device must be auto, cpu, cuda, or one GPU by its number, such as cuda:1; got 'gpu'"
        in capsys.readouterr().err
    )


def test_unusable_prompts_and_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="--max-tokens must be at least 1, got 0"):
        Sampling(max_tokens=0)
    with pytest.raises(ValueError, match="--temperature must be at least 0 and below 100, got -1"):
        Sampling(temperature=-1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device is cuda:1, but torch sees 0 GPUs here"):
        open_speaker(str(base()), device="cuda:1")
    ours = prompt("image")
    blind = Speaker(
        speaker().module, renderer=speaker().renderer, spec=None, stops=speaker().stops, device=torch.device("cpu")
    )
    with pytest.raises(ValueError, match="the prompt has images, but this model has no vision tower"):
        blind.answer([ours], SHORT)
    write_tiny(tmp_path / "mute", TinyModel(layers=1))
    (tmp_path / "mute" / "generation_config.json").unlink()
    config = (tmp_path / "mute" / "config.json").read_text()
    (tmp_path / "mute" / "config.json").write_text(config.replace('"eos_token_id"', '"no_eos"'))
    with pytest.raises(ValueError, match="says which token ends an answer"):
        open_speaker(str(tmp_path / "mute"))


def test_a_tiny_base_may_see_small_images_as_they_are(tmp_path: Path):
    write_tiny(tmp_path / "small", TinyModel(layers=1, image_min_tokens=4))
    assert read_spec(tmp_path / "small").image_min_pixels == 4 * 32 * 32
    assert read_spec(base()).image_min_pixels == 64 * 32 * 32
