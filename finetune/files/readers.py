"""The readers of adapters and merged folders that `make serve-proof` has compared with training, by release."""

TESTED = {"vllm": "0.32.0", "transformers": "5.24.0", "peft": "0.21.2"}
"""A test compares these with the record of the proof."""

_HEADING = "## Tested with\n"
_PEFT = """\
- vLLM {vllm} (its CPU build): equal to training on a dense base. On a mixture of experts its loader takes every key,
  but that build cannot compute it. Tensors in full are refused.
- PEFT {peft} on transformers {transformers}: equal to training on every base, in log-probabilities within 0.001.
"""
_SINGLE = """\
No server was run with this form. The flags above come from the sources of the servers.
"""


def tested_section(form: str) -> str:
    """Return the README section on the releases that were tried with a form of export, and what they computed."""
    text = _PEFT.format(**TESTED) if form == "peft" else _SINGLE
    return f"{_HEADING}\n{text}"
