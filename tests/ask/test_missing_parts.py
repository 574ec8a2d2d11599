"""A server that leaves out an adapter, or a part of it, is told by what it computes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_cases import WIDE, drawn_adapter
from bases import base
from chat_server import Server, serving
from media_files import encode, picture
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText

from finetune.config import RouterPartConfig
from launchers.cli import main


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held-out")
    (folder / "0.png").write_bytes(encode(Image.fromarray(picture(64, 96))))
    turns = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "B"}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": turns, "images": ["0.png"]}) + "\n")
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lora = replace(WIDE, router=RouterPartConfig(mode="frozen"))
    return drawn_adapter(tmp_path_factory.mktemp("lora") / "adapter", lora)


LEFT_OUT = {
    "": (0, ""),
    "lora": (3, "cause the server computes the base alone: it was started without the adapter"),
    "visual": (3, "cause the server leaves out the adapter's part vision_blocks: merge the adapter"),
    "experts": (3, "cause the server leaves out the adapter's part experts: merge the adapter"),
    "layers.1.": (3, "FAIL  log-probabilities"),
}
"""Names of factors that the server leaves out, the exit code, and the message."""


@pytest.mark.parametrize("left_out", LEFT_OUT)
def test_what_a_server_leaves_out_is_named(left_out, rows, adapter, capsys):
    plain = AutoModelForImageTextToText.from_pretrained(base(), dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, adapter).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if left_out and "lora_B" in name and left_out in name:
                parameter.zero_()
    code, said = LEFT_OUT[left_out]
    with serving(Server(base(), model)) as server:
        words = ["serve-check", server.url, str(rows), "--model", str(base()), "--adapter", str(adapter)]
        assert main([*words, "--max-tokens", "6", "--tolerance", "0.001"]) == code
    shown = capsys.readouterr().out
    assert said in shown
    assert ("cause" in shown) == said.startswith("cause")
