"""The README.md of an adapter folder, written from its metadata: what it changes, its origin and how to read it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune.adapters.media import media_section, trained_data
from finetune.adapters.provenance import PARENT, base_of, quantised_in_training, seen_settings

_HEAD = """\
---
library_name: peft
base_model: {base}
tags:
- lora
- moetune
---
"""


@dataclass(frozen=True, kw_only=True)
class PartLine:
    """A row of the card's table: one part of the model."""

    part: str
    how: str
    tensors: int
    parameters: int


def card(
    base: str, metadata: Mapping[str, str], lines: Sequence[PartLine], *, title: str = "Adapter", notes: str = ""
) -> bytes:
    """Return the text of the card; unknown facts are left out."""
    total = sum(line.parameters for line in lines)
    parts = [
        _HEAD.format(base=json.dumps(base)),
        f"# {title} for {base}\n",
        f"{total:,} parameters, written by moetune in PEFT's own format.\n",
        "| part | trained as | tensors | parameters |\n| --- | --- | ---: | ---: |",
        *(f"| {line.part} | {line.how} | {line.tensors:,} | {line.parameters:,} |" for line in lines),
        "",
        *_origin(metadata),
        *_media(metadata),
        notes or _READ,
    ]
    return "\n".join(parts).encode()


def _origin(metadata: Mapping[str, str]) -> list[str]:
    """The card's section on the adapter's origin, as far as the metadata records it."""
    lines: list[tuple[str, str]] = []
    base = base_of(metadata)
    if base is not None:
        lines.append(("base", f"{base.text()}, fingerprint `{base.fingerprint}`"))
    if forms := quantised_in_training(metadata):
        lines.append(("frozen weights while it trained", f"{forms}; merging adds the change to the base as published"))
    titles = {"moetune.data": "data plan", "moetune.step": "step", "moetune.seed": "seed"}
    lines += [(title, f"`{metadata[key]}`") for key, title in titles.items() if key in metadata]
    if "moetune.which" in metadata:
        lines.append(("which of the run's adapters", metadata["moetune.which"]))
    if "moetune.scores" in metadata:
        scores = json.loads(metadata["moetune.scores"])
        lines.append(("scores", ", ".join(f"{name} {value:.4g}" for name, value in scores.items())))
    if PARENT in metadata:
        parents = json.loads(metadata[PARENT])
        for parent in parents if isinstance(parents, list) else [parents]:
            weight = f", weight {parent['weight']:g}" if "weight" in parent else ""
            lines.append(("derived from", f"{parent['folder']} (sha256 `{parent['sha256'][:16]}`){weight}"))
    if "moetune.versions" in metadata:
        versions = json.loads(metadata["moetune.versions"])
        lines.append(("versions", ", ".join(f"{name} {number}" for name, number in versions.items())))
    return ["## Where it comes from\n", *(f"- {title}: {text}" for title, text in lines), ""] if lines else []


def _media(metadata: Mapping[str, str]) -> list[str]:
    """The card's section on image and video preparation, if training did not use the defaults."""
    seen = seen_settings(metadata)
    return [section] if (section := media_section(trained_data(seen, "the adapter's configuration"))) else []


_READ = """\
## How to read it

Load it with PEFT 0.19.1 or newer on transformers 5:

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained(BASE, dtype="bfloat16")
model = PeftModel.from_pretrained(model, THIS_FOLDER)
```

For servers, merge it or export it:

```bash
moetune merge BASE THIS_FOLDER MERGED --verify     # a model folder for every program that loads the base
moetune export THIS_FOLDER OUT --format peft       # vLLM
moetune export THIS_FOLDER OUT --format per-expert # sglang
```
"""
