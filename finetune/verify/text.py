"""Checks of a base's tokenizer, chat template and processor files against its config and against transformers."""

from __future__ import annotations

import hashlib
import json
from itertools import groupby
from pathlib import Path

from transformers import AutoTokenizer

from data.render.vision import read_spec
from finetune.architecture.families import Family
from finetune.files.hubfiles import PLAIN_TOKENS, SPECIAL_TOKENS
from finetune.verify.card import Check
from finetune.verify.samples import trials

# The template of Qwen3-VL's Instruct models, all sizes; the Thinking models have another one.
_INSTRUCT_TEMPLATE = "3636d0f0bd6bef02654cdffdc447b79cb2cef8ab02cc75267345946291a489e4"
_QWEN3_VOCABULARY = "ca10d7e9fb3ed18575dd1e277a2579c16d108e32f27439684afa0e10b1440910"


def check_tokenizer(folder: Path, model: Family) -> Check:
    """Check that the config's ids are the tokenizer's, and that every token has a row in the embedding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {
        "image_token_id": ("<|image_pad|>", model.image_token_id),
        "video_token_id": ("<|video_pad|>", model.video_token_id),
        "vision_start_token_id": ("<|vision_start|>", model.vision_start_token_id),
        "vision_end_token_id": ("<|vision_end|>", model.vision_end_token_id),
        "text_config.bos_token_id": ("<|endoftext|>", model.text.bos_token_id),
        "text_config.eos_token_id": ("<|im_end|>", model.text.eos_token_id),
    }
    vocabulary = tokenizer.get_vocab()
    wrong = [
        f"{key} is {number}, but {token} is token {vocabulary.get(token)}"
        for key, (token, number) in ids.items()
        if vocabulary.get(token) != number
    ]
    absent = [token for token in SPECIAL_TOKENS + PLAIN_TOKENS if token not in vocabulary]
    if absent:
        wrong.append(f"the tokenizer lacks {', '.join(absent)}")
    largest = max(vocabulary.values())
    if largest >= model.text.vocab_size:
        wrong.append(f"token {largest} has no row in the embedding of {model.text.vocab_size}")
    if wrong:
        return Check(name="tokenizer", status="fail", detail="; ".join(wrong))
    file = folder / "vocab.json"
    real = file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == _QWEN3_VOCABULARY
    kind = "the published Qwen3 vocabulary" if real else "not the published Qwen3 vocabulary"
    return Check(
        name="tokenizer",
        status="pass",
        detail=f"{len(vocabulary):,} tokens, {kind}; ids match the config",
    )


def check_template(folder: Path, model: Family) -> Check:
    """Check that all copies of the template agree, and that `data.render` makes the same tokens as transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    copies = _template_copies(folder)
    if len(set(copies.values())) != 1:
        names = ", ".join(copies)
        detail = f"the copies of the chat template differ: {names}" if copies else "there is no chat template"
        return Check(name="template", status="fail", detail=detail)
    (template,) = set(copies.values())
    for trial in trials(folder):
        if trial.layout is not None:
            continue  # `data.render` adds frame times, and transformers' template does not
        turns = [
            {
                "role": message.role,
                "content": [
                    {"type": part.kind, **({"text": part.text} if part.kind == "text" else {})}
                    for part in message.contents
                ],
            }
            for message in trial.record.messages
        ]
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
        theirs = tokenizer(text, add_special_tokens=False).input_ids
        ours = [token for token, _ in groupby(trial.sample.input_ids.tolist())]
        if ours != [token for token, _ in groupby(theirs)]:
            detail = f"{trial.name}: tokens differ from those of transformers"
            return Check(name="template", status="fail", detail=detail)
    known = hashlib.sha256(template.encode()).hexdigest() == _INSTRUCT_TEMPLATE
    kind = "Qwen3-VL's Instruct template" if known else "not Qwen3-VL's Instruct template"
    return Check(name="template", status="pass", detail=f"{kind}; renders the same tokens as transformers")


def check_processor(folder: Path, model: Family) -> Check:
    """Check that the processor files define patches of the sizes that the tower expects."""
    spec, vision = read_spec(folder), model.vision
    sizes = {
        "patch_size": (spec.patch, vision.patch_size),
        "merge_size": (spec.merge, vision.spatial_merge_size),
        "temporal_patch_size": (spec.temporal, vision.temporal_patch_size),
    }
    wrong = [f"{key} is {cut}, but the tower has {tower}" for key, (cut, tower) in sizes.items() if cut != tower]
    if wrong:
        return Check(name="processor", status="fail", detail="; ".join(wrong))
    return Check(
        name="processor", status="pass", detail=f"patches of {spec.patch} x {spec.patch}, merged {spec.merge} x"
    )


def _template_copies(folder: Path) -> dict[str, str]:
    """Return file name -> chat template, for every file that has one."""
    templates = {}
    if (folder / "chat_template.jinja").is_file():
        templates["chat_template.jinja"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
            if template:
                templates[name] = template
    return templates
