"""What the page inside an export says: which programs read this form, with which flags, and what to look out for."""

from __future__ import annotations

from collections.abc import Sequence

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes

_PEFT = """\
## What reads it

Experts lie packed in PEFT's fused form (PEFT 0.19.1 and newer on transformers 5).

- **vLLM**, whose Qwen3-VL-MoE takes this form by itself:

```bash
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules mine=THIS_FOLDER
```

- **PEFT**: `PeftModel.from_pretrained(model, THIS_FOLDER)`.
"""
_SINGLE = """\
## What reads it

Every expert has keys of its own (`experts.N.gate_proj`, `up_proj`, `down_proj`), each a plain 2-D pair.

- **sglang**:

```bash
python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths mine=THIS_FOLDER --max-lora-rank {r}
```

- **vLLM** takes this form only where it is told so (`enable_mixed_moe_lora_format`, and for this adapter
  `is_3d_lora_weight` false); a wrong declaration loads garbage without a word. Export with `--format peft` for it.
- Trainers and converters that name experts one by one. PEFT on transformers 5 does not: its experts are fused.
"""
_END = """\
A server that does not know an adapter's keys may drop them without an error. After starting it, compare its answers
with those of the merged model: `moetune serve-check` does that. The surest form to serve is a merged folder.
"""


def notes(form: str, base: str, r: int, warnings: Sequence[str]) -> str:
    """Return the page's last part."""
    rank = next((size for size in _RANKS if size >= r), r)
    text = (_PEFT if form == "peft" else _SINGLE).format(base=base, rank=rank, r=r)
    listed = "".join(f"- {line}.\n" for line in warnings)
    return text + (f"\n## Note\n\n{listed}" if listed else "") + "\n" + _END
