"""The served models: short runs on tiny bases, the form in which each is served, and the outcome that is expected."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.serving.rows import KINDS, ODD_TOOLS, THINKING

Outcome = Literal["equal", "differs", "refused"]
Form = Literal["base", "merged", "adapter", "exported"]

LORA = ("attention", "experts", "router", "vision_blocks", "merger", "deepstack_mergers")
DENSE = ("attention", "mlp", "vision_blocks", "merger", "deepstack_mergers")
LIMITS = (
    "data.image.min_tokens=4",
    "data.image.max_tokens=20",
    "data.video.max_tokens=40",
    "data.video.fps=4",
    "data.video.max_frames=6",
)


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A short run: its base, the parts that train by mode, and on how many ranks."""

    name: str
    base: str = "moe"
    lora: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    ep: int = 1
    settings: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """Return the words that make the recipe of the proof this run."""
        modes = dict.fromkeys(self.lora, "lora") | dict.fromkeys(self.full, "full")
        modes = {"attention": "frozen"} | modes
        balance = ["moe.balance=global"] if "router" in modes else []
        return [*(f"adapters.{part}.mode={mode}" for part, mode in modes.items()), *balance, *self.settings]


IGNORED = "It will be ignored"
"""The line of vLLM's log about a part of an adapter that it leaves out."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a server cannot take something, and the words in its log that prove it."""

    reason: str
    says: tuple[str, ...]

    def is_proved_by(self, log: str) -> bool:
        """Say whether a log has all of these words, and names no part as left out unless they do."""
        return all(words in log for words in self.says) and (IGNORED in log) == (IGNORED in self.says)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something served: a base, or a run in some form. `control` says with what it must not agree."""

    name: str
    base: str = "moe"
    tuned: str = ""
    form: Form = "merged"
    kinds: tuple[str, ...] = KINDS
    control: Literal["base", "tuned", "limits", "context", "template"] = "base"
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    """Servers that cannot take it, each with the reason."""


_NO_TRITON = Refusal(
    reason="its loader takes every key; computing experts with LoRA needs Triton, which vLLM's CPU build has not",
    says=("Loaded new LoRA adapter", "triton_moe.py"),
)
_QKV = Refusal(
    reason="its loader takes every key but leaves out the tower's attn.qkv, with a warning; computing needs Triton",
    says=("Loaded new LoRA adapter", "triton_moe.py", "visual.blocks.0.attn.qkv", IGNORED),
)
_FULL = Refusal(
    reason="vLLM takes no tensors in full (modules_to_save)",
    says=("vLLM only supports modules_to_save being either None",),
)

PICTURES = "pictures"
"""The run that learns its answers by heart, so that a harness gives it another score than its base."""
GGUF = "gguf"
"""The run that is served by llama.cpp."""

RUNS = (
    Tuned(name=GGUF, base="qwen3", lora=("attention", "experts", "vision_blocks"), settings=("schedule.steps=32",)),
    Tuned(name=PICTURES, base="dense", lora=DENSE, settings=("schedule.steps=96",)),
    *(Tuned(name=f"only-{part.replace('_', '-')}", lora=(part,)) for part in LORA),
    Tuned(name="router-full", full=("router",)),
    Tuned(name="merger-full", full=("merger",)),
    *(Tuned(name=f"all-ep{ep}", lora=LORA, ep=ep) for ep in (1, 2, 4)),
    Tuned(name="all-full", lora=("attention", "experts"), full=("router", "merger")),
    Tuned(name="yarn", lora=("attention", "experts"), settings=("context.yarn.factor=2",)),
    Tuned(name="limits", lora=("attention", "experts", "vision_blocks"), settings=LIMITS),
    Tuned(name="thinking", base="thinking", lora=("attention", "experts")),
    Tuned(name="dense", base="dense", lora=DENSE),
    Tuned(name="dense-limits", base="dense", lora=DENSE, settings=LIMITS),
    Tuned(name="dense-yarn", base="dense", lora=("attention", "mlp"), settings=("context.yarn.factor=2",)),
)

CASES = (
    Case(name="base", form="base", control="tuned"),
    Case(name="dense base", base="dense", form="base", control="tuned"),
    *(Case(name=f"merged, LoRA on {part} alone", tuned=f"only-{part.replace('_', '-')}") for part in LORA),
    Case(name="model with routers trained in full", tuned="router-full"),
    Case(name="model with its merger trained in full", tuned="merger-full"),
    Case(name="merged, LoRA on every part, ep 1", tuned="all-ep1"),
    Case(name="merged, LoRA on every part, ep 2", tuned="all-ep2", kinds=(*KINDS, ODD_TOOLS)),
    Case(name="merged, LoRA on every part, ep 4", tuned="all-ep4"),
    Case(name="merged, LoRA with routers and merger in full", tuned="all-full"),
    Case(name="merged, YaRN", tuned="yarn", control="context"),
    Case(name="merged, trained image and video limits", tuned="limits", control="limits"),
    Case(
        name="merged, thinking template",
        base="thinking",
        tuned="thinking",
        kinds=(*KINDS, THINKING),
        control="template",
    ),
    Case(name="adapter on a dense base, tower and mergers included", base="dense", tuned="dense", form="adapter"),
    Case(name="exported adapter on a dense base", base="dense", tuned="dense", form="exported"),
    Case(
        name="adapter on a dense base, trained image and video limits",
        base="dense",
        tuned="dense-limits",
        form="adapter",
        control="limits",
    ),
    Case(name="adapter on a dense base, YaRN", base="dense", tuned="dense-yarn", form="adapter", control="context"),
    Case(name="adapter on attention of a MoE", tuned="only-attention", form="adapter", refused={"vllm": _NO_TRITON}),
    Case(name="exported adapter on experts", tuned="only-experts", form="exported", refused={"vllm": _NO_TRITON}),
    Case(name="adapter on every part of a MoE", tuned="all-ep2", form="adapter", refused={"vllm": _QKV}),
    Case(name="adapter with routers and merger in full", tuned="all-full", form="adapter", refused={"vllm": _FULL}),
)
BY_KIND = "merged, LoRA on every part, ep 2"
"""The case whose kinds of conversation are counted one by one."""
DIFFERS = {("vllm", ODD_TOOLS): "vLLM writes `description: null` into the prompt for a tool without a description"}
"""Kinds of conversation that a server writes otherwise than training did, each with the reason."""


def run_of(name: str) -> Tuned:
    """Return a run by its name."""
    return next(run for run in RUNS if run.name == name)
