"""The card of a base checkpoint: sound bases pass, faults are named, and layers are computed one at a time."""

import argparse
import json
import shutil
from pathlib import Path

import fp8_files as fp8
import pytest
import torch
from base_variants import folder_with, per_expert, weights
from transformers import AutoModelForImageTextToText

import launchers.verify_base
from finetune.architecture.families import family
from finetune.architecture.shapes import parameter_shapes
from finetune.files.basefiles import open_base
from finetune.files.hubconfig import hub_config
from finetune.files.hubfiles import chat_template
from finetune.files.tiny import TinyModel, write_tiny
from finetune.model.weights import rebuild_tables
from finetune.verify.base import Options, verify_base
from finetune.verify.card import Check
from finetune.verify.compute import TOLERANCES, Outcome, compare, library_reader, video_preference
from finetune.verify.samples import trials
from finetune.verify.streaming import streamed

NAMES = ["files", "config", "weights", "tokenizer", "template", "processor", "logits", "video layout"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("bases") / name for name in ("moe", "tied", "bfloat16", "fp8")}
    write_tiny(made["moe"])
    write_tiny(made["tied"], TinyModel(experts=None, tied=True, layers=4, shard_bytes=200_000))
    write_tiny(made["bfloat16"], TinyModel(dtype="bfloat16", experts=6, top_k=3))
    write_tiny(made["fp8"], TinyModel(fp8="stacked", hidden=136, expert_hidden=72, experts=3))
    return made


@pytest.fixture
def moe(bases, tmp_path) -> Path:
    """Return a copy to be damaged."""
    return shutil.copytree(bases["moe"], tmp_path / "moe")


def card(folder: Path, **options) -> dict[str, Check]:
    return {check.name: check for check in verify_base(folder, Options(**options))}


def statuses(checks: dict[str, Check]) -> dict[str, str]:
    return {name: check.status for name, check in checks.items()}


def change(file: Path, **values) -> None:
    content = json.loads(file.read_text())
    for path, value in values.items():
        *blocks, key = path.split("__")
        part = content
        for block in blocks:
            part = part[block]
        part[key] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(("name", "config"), [("moe", "pass"), ("tied", "note"), ("bfloat16", "note"), ("fp8", "note")])
def test_a_sound_base_passes_every_check(bases, name, config):
    checks = card(bases[name])
    assert list(checks) == NAMES
    expected = dict.fromkeys(NAMES, "pass") | {"config": config, "video layout": "note"}
    assert statuses(checks) == expected, checks
    assert "next token equal at" in checks["logits"].detail
    assert "no clear preference" in checks["video layout"].detail, "random weights know no layout"


def test_bfloat16_may_change_single_positions(bases):
    assert card(bases["bfloat16"], dtype="bfloat16")["logits"].status == "pass"


@pytest.mark.parametrize("layout", ["memory", "per_expert"])
def test_other_layouts_compute_the_same(bases, tmp_path, layout):
    tensors = weights(bases["moe"])
    folder = folder_with(tmp_path, bases["moe"], per_expert(tensors) if layout == "per_expert" else tensors)
    for file in bases["moe"].glob("*"):
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    checks = card(folder)
    assert f"layout {layout}" in checks["weights"].detail
    assert checks["logits"].status == "pass"
    assert checks["logits"].detail == card(bases["moe"])["logits"].detail


def test_a_streamed_model_computes_the_same_as_a_complete_one_and_keeps_one_layer(bases):
    files = open_base(bases["moe"])
    whole = AutoModelForImageTextToText.from_pretrained(bases["moe"])
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(whole.config, dtype=torch.float32)
    cpu = torch.device("cpu")
    rebuild_tables(empty, cpu)
    ids = torch.tensor([[5, 600, 7, 300, 41, 2, 2, 901]])
    given = {"canonical": lambda name: name, "device": cpu, "dtype": torch.float32}
    for read in (files.read, library_reader(files)):
        with torch.no_grad(), streamed(empty, read, **given) as state:
            assert torch.equal(empty(input_ids=ids).logits, whole(input_ids=ids).logits)
        assert all(parameter.is_meta for parameter in empty.parameters()), "every weight was dropped again"
        sizes: dict[str, int] = {}
        for name in files.shapes:
            layer = name.split(".layers.")[1].split(".")[0] if ".layers." in name else name
            sizes[layer] = sizes.get(layer, 0) + files.size(name)
        assert state.bytes_peak == max(sizes.values())
        assert state.bytes_now == 0


def test_a_model_that_computes_something_else_fails_and_the_first_layer_is_named(moe):
    """transformers ignores this key and our layer obeys it, so that its scores are not normalised."""
    change(moe / "config.json", text_config__norm_topk_prob=False)
    checks = card(moe)
    assert checks["logits"].status == "fail"
    assert "the models first differ at language_model.layers.0" in checks["logits"].detail
    assert "; worst in " in checks["logits"].detail


def test_a_corrupted_scale_fails_before_anything_is_computed(bases, tmp_path):
    folder = shutil.copytree(bases["fp8"], tmp_path / "fp8")
    assert card(folder, compute=False)["weights"].detail.endswith("layout hub, fp8 (e4m3 in blocks of 128 x 128)")
    name = "model.language_model.layers.2.mlp.experts.down_proj_scale_inv"
    fp8.changed(folder, **{name: torch.full((3, 1, 2), -1.0)})
    checks = card(folder)
    assert checks["weights"].status == "fail"
    assert f"{name} holds the scale -1.0; a scale must be a finite number above 0" in checks["weights"].detail
    assert checks["logits"].status == "skip"


def test_wrong_files_fail_and_checks_that_need_them_are_skipped(moe):
    (moe / "model.safetensors").write_bytes((moe / "model.safetensors").read_bytes()[:-1])
    (moe / "video_preprocessor_config.json").unlink()
    checks = card(moe)
    assert statuses(checks) == {
        "files": "fail",
        "config": "pass",
        "weights": "fail",
        "logits": "skip",
        "video layout": "skip",
    }
    assert "lacks video_preprocessor_config.json" in checks["files"].detail
    assert "it was cut off" in checks["weights"].detail
    change(moe / "config.json", text_config__hidden_size=0)
    assert "text_config.hidden_size must be a whole number above 0, got 0" in card(moe)["config"].detail


def test_the_users_layout_is_checked_against_the_files(moe):
    checks = card(moe, layout="memory", compute=False)
    assert "experts are stored in the other fused layout" in checks["weights"].detail
    assert checks["logits"].detail == "skipped by --no-compute"


def test_a_config_is_compared_with_the_given_or_most_likely_family(moe):
    assert "differs from qwen3-vl-8b: " in card(moe, family="qwen3-vl-8b", compute=False)["config"].detail
    published = hub_config(family("qwen3-vl-30b-a3b"))
    published["text_config"]["rope_theta"] = 500_000
    (moe / "config.json").write_text(json.dumps(published))
    check = card(moe, compute=False)["config"]
    assert check.status == "fail"
    assert check.detail == "differs from qwen3-vl-30b-a3b: text_config.rope_theta is 500000, not 5000000"
    with pytest.raises(ValueError, match="'qwen3-vl-9b' is not a known family; did you mean"):
        list(verify_base(moe, Options(family="qwen3-vl-9b")))


def test_ids_of_other_tokens_fail(moe):
    change(moe / "config.json", image_token_id=1005, text_config__eos_token_id=5)
    detail = card(moe, compute=False)["tokenizer"].detail
    assert "image_token_id is 1005, but <|image_pad|> is token 1004" in detail
    assert "text_config.eos_token_id is 5, but <|im_end|> is token 994" in detail


def test_a_tokenizer_larger_than_the_embedding_or_without_qwens_tokens_fails(moe):
    change(moe / "config.json", text_config__vocab_size=1010)
    assert "token 1017 has no row in the embedding of 1010" in card(moe, compute=False)["tokenizer"].detail
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (moe / name).write_text((moe / name).read_text().replace("<think>", "<thunk>"))
    assert "the tokenizer lacks <think>" in card(moe, compute=False)["tokenizer"].detail


def test_templates_that_contradict_each_other_or_are_missing_fail(moe):
    other = chat_template().replace("Picture", "Image")
    change(moe / "chat_template.json", chat_template=other)
    detail = card(moe, compute=False)["template"].detail
    assert detail == "the copies of the chat template differ: chat_template.json, tokenizer_config.json"
    change(moe / "tokenizer_config.json", chat_template=other)
    check = card(moe, compute=False)["template"]
    assert (check.status, check.detail) == (
        "pass",
        "not Qwen3-VL's Instruct template; renders the same tokens as transformers",
    )
    change(moe / "tokenizer_config.json", chat_template="")
    (moe / "chat_template.json").unlink()
    check = card(moe, compute=False)["template"]
    assert (check.status, check.detail) == ("fail", "there is no chat template")


def test_a_template_that_writes_images_differently_fails(moe):
    own = chat_template().replace("<|vision_start|><|image_pad|>", "Here: <|vision_start|><|image_pad|>")
    change(moe / "chat_template.json", chat_template=own)
    change(moe / "tokenizer_config.json", chat_template=own)
    assert card(moe, compute=False)["template"].detail == "image: tokens differ from those of transformers"


def test_patches_of_another_size_than_the_towers_fail(moe):
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        change(moe / name, patch_size=14)
    assert "patch_size is 14, but the tower has 16" in card(moe, compute=False)["processor"].detail


def outcome(logits: torch.Tensor, **layers: torch.Tensor) -> Outcome:
    return Outcome(logits=logits, layers=layers, bytes_peak=7)


def test_compare_names_the_sample_and_the_layer():
    torch.manual_seed(0)
    logits, layer = torch.randn(6, 9), torch.randn(6, 4)
    chosen, names = [[0, 3], [1], [0, 1, 2]], ["a", "b", "c"]
    strict, loose = TOLERANCES["float32"], TOLERANCES["bfloat16"]
    same = compare(chosen, names, outcome(logits, x=layer), outcome(logits.clone(), x=layer), strict)
    assert (same.status, "6 positions of 3 samples" in same.detail) == ("pass", True)
    spoiled = logits.clone()
    spoiled[2, 4] += 0.1
    head = compare(chosen, names, outcome(spoiled, x=layer), outcome(logits, x=layer), strict)
    assert head.status == "fail"
    assert head.detail.endswith("worst in b; the layers agree, but the head differs")
    assert compare(chosen, names, outcome(spoiled, x=layer), outcome(logits, x=layer), loose).status == "pass"
    parted = compare(chosen, names, outcome(spoiled, w=layer, x=layer), outcome(logits, w=layer, x=layer + 1), strict)
    assert parted.detail.endswith("the models first differ at x")
    broken = compare(chosen, names, outcome(logits * float("nan"), x=layer), outcome(logits, x=layer), strict)
    assert broken.status == "fail", "logits that are not numbers must not pass"


@pytest.mark.parametrize("known", ["nested", "flat"])
def test_the_preferred_video_layout_is_the_one_whose_answers_are_cheap(bases, known):
    made = trials(bases["moe"])
    assert [trial.layout for trial in made] == [None] * 2 + ["nested"] * 4 + ["flat"] * 4
    chosen, rows = [], []
    for trial in made:
        chosen.append(list(range(len(trial.sample.input_ids))))
        logits = torch.zeros(len(trial.sample.input_ids), 1024)
        if trial.layout == known:
            labels = torch.from_numpy(trial.sample.input_ids[1:]).long()
            logits[torch.arange(len(labels)), labels] = 20
        rows.append(logits)
    check = video_preference(made, chosen, torch.cat(rows))
    assert f"the weights prefer {known} ({known} cheaper in 4 of 4)" in check.detail
    assert f"{known} 0.000" in check.detail
    assert " 6.931" in check.detail, "ln 1024 for the layout that the weights do not know"


def test_the_layouts_differ_only_in_the_outer_vision_marks(bases):
    made = {trial.name: trial.sample for trial in trials(bases["moe"])}
    nested, flat = made["turns blue (nested)"].input_ids, made["turns blue (flat)"].input_ids
    assert sum(nested == 1001) == sum(flat == 1001) + 1
    assert sum(nested == 1005) == sum(flat == 1005) > 0


def run_command(capsys, *words) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    launchers.verify_base.arguments(parser)
    code = launchers.verify_base.run(parser.parse_args([str(word) for word in words]))
    return code, capsys.readouterr().out


def test_the_command_prints_a_card_and_sets_its_exit_code(moe, capsys):
    code, printed = run_command(capsys, moe)
    assert (code, printed.splitlines()[-1]) == (0, f"{moe}: passed")
    assert [line[:4] for line in printed.splitlines()[:-1]] == ["pass"] * 7 + ["note"]
    (moe / "tokenizer_config.json").unlink()
    shutil.copy(moe / "chat_template.json", moe / "tokenizer_config.json")
    change(moe / "config.json", image_token_id=3)
    code, printed = run_command(capsys, moe, "--no-compute", "--json")
    assert code == 3
    output = json.loads(printed)
    assert output["passed"] is False
    assert [check["name"] for check in output["checks"]] == NAMES


def test_the_family_table_covers_the_shapes_of_both_bases(bases):
    assert parameter_shapes(family("tiny-moe")) == open_base(bases["moe"]).shapes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_card_on_a_gpu(bases, dtype):
    assert card(bases["moe"], device="cuda:0", dtype=dtype)["logits"].status == "pass"
