"""`balance`: how the routers spread each kind of token over the experts of each layer, and which experts get none."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.render.sample import Sample
from finetune.ask.speaker import Speaker
from finetune.probes.letters import letter_trial
from finetune.probes.needle import text_haystack
from finetune.probes.order import order_trial
from finetune.probes.trial import Trial
from moe.expert_load import StepLoad
from moe.parallel import ExpertParallelMoe

KINDS = ("text", "image", "video", "other")
"""Kinds of tokens; `other` are the control tokens of the chat template, such as those that begin a turn or an image."""
ALL = "all"
SENTENCES = 24
"""Sentences of a text."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """The experts that tokens of one kind chose; `ALL` is the kind of all tokens together."""

    kind: str
    tokens: int
    load: StepLoad

    @property
    def dead(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of the experts of each layer that got no token of this kind."""
        return tuple(tuple(e for e, count in enumerate(counts) if not count) for counts in self.load.counts)

    @property
    def shares(self) -> list[list[float]]:
        """The load of each layer's experts, relative to an even one: 1 is even, 0 is dead."""
        return [[count * len(counts) / sum(counts) for count in counts] for counts in self.load.counts]

    def to_json(self) -> dict[str, Any]:
        """Return counts and figures as an object."""
        return {
            "kind": self.kind,
            "tokens": self.tokens,
            "counts": self.load.counts,
            "entropy": self.load.entropy,
            "max_over_mean": self.load.max_over_mean,
            "dead": self.dead,
        }


def load_lines(loads: Sequence[Load]) -> list[str]:
    """Return the lines of a table for a terminal: a line for each kind, then every dead expert by layer."""
    lines = [f"{'tokens of':<10}{'number':>9}  lowest entropy  max/mean  dead experts"]
    for load in loads:
        figures = load.load
        lines.append(
            f"{load.kind:<10}{load.tokens:>9,}  {figures.expert_load_entropy:>14.3f}"
            f"  {figures.expert_load_max_over_mean:>8.2f}  {figures.experts_dead:>12,}"
        )
    dead = next(load.dead for load in loads if load.kind == ALL)
    named = [f"layer {at}: experts {', '.join(map(str, experts))}" for at, experts in enumerate(dead) if experts]
    return [*lines, "without any token: " + ("; ".join(named) or "no expert")]


def shown(*, trials: int, seed: int, side: int) -> list[Trial]:
    """Make texts, pictures and clips, `trials` of each."""
    numbers = range(seed * 1000, seed * 1000 + trials)
    texts = [text_haystack(SENTENCES, 0.5, seed=number) for number in numbers]
    pictures = [letter_trial(side // 4, side=side, seed=number) for number in numbers]
    return [*texts, *pictures, *(order_trial("first", seed=number, side=side) for number in numbers)]


def probe(speaker: Speaker, *, trials: int, seed: int, side: int) -> list[Load]:
    """Return the load of each kind of token that was shown, and of all together; raise ValueError without experts."""
    layers = [module for module in speaker.module.modules() if isinstance(module, ExpertParallelMoe)]
    if not layers:
        raise ValueError("this model is dense, so it has no experts to balance; probe a mixture of experts")
    counts_KLE = torch.zeros(len(KINDS), len(layers), layers[0].num_experts, dtype=torch.int64)
    tokens_K = torch.zeros(len(KINDS), dtype=torch.int64)
    for trial in shown(trials=trials, seed=seed, side=side):
        prompt = speaker.require_room(trial.prompt(speaker.renderer))
        kinds_T = kinds_of(prompt, speaker)
        tokens_K += kinds_T.bincount(minlength=len(KINDS))
        with counted(layers, kinds_T, counts_KLE):
            speaker.judge(prompt, speaker.renderer.encode(trial.answer)[:1])
    groups = {ALL: range(len(KINDS))} | {kind: [at] for at, kind in enumerate(KINDS) if tokens_K[at]}
    return [
        Load(kind=kind, tokens=int(tokens_K[list(places)].sum()), load=_load(counts_KLE[list(places)].sum(0)))
        for kind, places in groups.items()
    ]


def kinds_of(prompt: Sample, speaker: Speaker) -> Tensor:
    """Return the place in KINDS of each token of a prompt."""
    ids_T = torch.from_numpy(prompt.input_ids)
    kinds_T = torch.isin(ids_T, torch.tensor(sorted(speaker.renderer.control_ids))) * KINDS.index("other")
    for kind in ("image", "video"):
        token = getattr(speaker.module.config, f"{kind}_token_id", None)  # a model of text alone has none
        kinds_T[ids_T == token] = KINDS.index(kind)
    return kinds_T


@contextmanager
def counted(layers: Sequence[ExpertParallelMoe], kinds_T: Tensor, counts_KLE: Tensor) -> Iterator[None]:
    """Add the choices of the routers to the counts, as the layers make them."""
    rows_T = kinds_T[:, None]

    def count(layer: int, logits: Tensor, probs_TE: Tensor, topk_TK: Tensor, base: Tensor | None) -> Tensor:
        chosen_TK = topk_TK.cpu()
        places = (rows_T.expand_as(chosen_TK).flatten(), chosen_TK.flatten())
        counts_KLE[:, layer].index_put_(places, torch.ones_like(places[0]), accumulate=True)
        return probs_TE

    before = [layer.balance for layer in layers]
    for layer in layers:
        layer.balance = count
    try:
        yield
    finally:
        for layer, call in zip(layers, before, strict=True):
            layer.balance = call


def _load(counts_LE: Tensor) -> StepLoad:
    counts: list[list[int]] = counts_LE.tolist()
    return StepLoad(counts=tuple(map(tuple, counts)), balance=(), z=(), agreement=None)
