"""Answers with a loaded model in one process: greedy or sampled, one prompt or a batch, token by token.

Prompts of a batch are padded on the left; a single prompt has neither padding nor mask. With a temperature, every
prompt has a random generator of its own, so that an answer does not depend on the rest of its batch.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from data.render.sample import Renderer, Sample
from data.render.vision import VisionSpec, normalise
from finetune.model.lora import adapters_off


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings for the choice of tokens; temperature 0 is greedy."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"--max-tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature < 100:
            raise ValueError(
                f"--temperature must be at least 0 and below 100, got {self.temperature}. 0 is greedy, 1 is the "
                f"model's own distribution"
            )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer of a model. `finished` means that it ended by itself, not at max_tokens."""

    ids: tuple[int, ...]
    text: str
    finished: bool


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Our log-probabilities of a token that another model wrote, and of our own choice in its place."""

    chosen: float
    best: float
    best_id: int


class Speaker:
    """A loaded model with everything needed to ask it."""

    def __init__(
        self,
        module: Any,
        *,
        renderer: Renderer,
        spec: VisionSpec | None,
        stops: frozenset[int],
        device: torch.device,
        switches: bool = False,
        adapted: Sequence[str] = (),
    ) -> None:
        self.module = module.eval()
        self.renderer, self.spec = renderer, spec
        self.stops, self.device = stops, device
        # transformers 5.24 renamed the argument, and warns about the name in 5.23
        self.keyword = "cache" if "cache" in signature(module.model.forward).parameters else "past_key_values"
        self.switches = switches
        """True if the adapter can be switched off completely."""
        self.adapted = tuple(adapted)
        """The parts of the model whose low-rank factors can be switched off."""

    def base_alone(self) -> AbstractContextManager[None]:
        """Return a context in which the adapter is switched off."""
        assert self.switches, "fully trained parts, and changes added to the weights, cannot be switched off"
        return adapters_off(self.module)

    def without(self, parts: Collection[str]) -> AbstractContextManager[None]:
        """Return a context in which the adapter is switched off on some of its parts."""
        return adapters_off(self.module, parts)

    def require_room(self, prompt: Sample) -> Sample:
        """Return the prompt; raise ValueError if it has more positions than the model supports."""
        positions = int(prompt.positions[1:].max()) + 1
        known = self.module.config.get_text_config().max_position_embeddings
        if positions > known:
            raise ValueError(
                f"the prompt takes {positions:,} positions ({len(prompt.input_ids):,} tokens), but the model supports "
                f"{known:,}. Shorten it, show smaller images or fewer frames, or set context.yarn.factor if the model "
                f"was trained with it"
            )
        return prompt

    def stream(self, prompt: Sample, sampling: Sampling) -> Iterator[str]:
        """Yield the text of one answer piece by piece; an incomplete character is held until its next token."""
        ids: list[int] = []
        streamed = ""
        for (token,) in self._tokens([prompt], sampling, [0]):
            ids += [token] if token not in self.stops else []
            text = self.renderer.decode(ids)
            if not text.endswith("\ufffd"):
                yield text[len(streamed) :]
                streamed = text
        if ids:
            yield self.renderer.decode(ids)[len(streamed) :]

    def answer(self, prompts: Sequence[Sample], sampling: Sampling, *, numbers: Sequence[int] = ()) -> list[Answer]:
        """Answer prompts in one batch; `numbers` are the seeds of their random generators."""
        ids: list[list[int]] = [[] for _ in prompts]
        finished = [False] * len(prompts)
        for tokens in self._tokens(prompts, sampling, numbers or range(len(prompts))):
            for at, token in enumerate(tokens):
                if token in self.stops:
                    finished[at] = True
                elif not finished[at]:
                    ids[at].append(token)
        return [
            Answer(ids=tuple(own_ids), text=self.renderer.decode(own_ids), finished=is_finished)
            for own_ids, is_finished in zip(ids, finished, strict=True)
        ]

    @torch.inference_mode()
    def judge(self, prompt: Sample, continuation: Sequence[int]) -> list[Judged]:
        """Score each token of a continuation, given the prompt and the tokens before it, in one forward."""
        continued = replace(
            prompt,
            input_ids=torch.cat([torch.from_numpy(prompt.input_ids), torch.tensor(continuation[:-1])]).int().numpy(),
            positions=_continued(torch.from_numpy(prompt.positions), len(continuation) - 1).int().numpy(),
        )
        hidden_TD = self.module.model(**self._inputs([continued]), use_cache=False).last_hidden_state[0]
        logs_TV = self.module.lm_head(hidden_TD[-len(continuation) :]).float().log_softmax(-1)
        tokens_T = torch.tensor(continuation, device=logs_TV.device)
        chosen_T = logs_TV.gather(1, tokens_T[:, None])[:, 0]
        best_T, best_id_T = logs_TV.max(-1)
        rows = zip(chosen_T.tolist(), best_T.tolist(), best_id_T.tolist(), strict=True)
        return [Judged(chosen=chosen, best=best, best_id=best_id) for chosen, best, best_id in rows]

    def _tokens(self, prompts: Sequence[Sample], sampling: Sampling, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Yield the next token of every prompt until all have ended; tokens after the end of one have no meaning."""
        generators = [torch.Generator().manual_seed(sampling.seed * 1_000_003 + number) for number in numbers]
        ended = [False] * len(prompts)
        cache, inputs = DynamicCache(config=self.module.config), self._inputs(prompts)
        mask, positions = inputs["attention_mask"], inputs["position_ids"]
        for step in range(sampling.max_tokens):
            tokens = _choose(self._next_logits(inputs, cache), sampling.temperature, generators)
            ended = [done or token in self.stops for done, token in zip(ended, tokens, strict=True)]
            yield tokens
            if all(ended) or step + 1 == sampling.max_tokens:
                return
            positions = _next(positions)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(tokens), 1)], dim=1)
            ids = torch.tensor(tokens, device=self.device)[:, None]
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}

    @torch.inference_mode()  # not around the loop, because a generator would leave the mode on for its caller
    def _next_logits(self, inputs: dict[str, Any], cache: DynamicCache) -> Tensor:
        hidden_BTD = self.module.model(**inputs, **{self.keyword: cache}, use_cache=True).last_hidden_state
        logits_BV: Tensor = self.module.lm_head(hidden_BTD[:, -1]).float()
        return logits_BV

    def _inputs(self, prompts: Sequence[Sample]) -> dict[str, Any]:
        """Return rows padded on the left, and the pixels of all prompts in the order of the rows."""
        longest = max(len(prompt.input_ids) for prompt in prompts)
        ids = torch.full((len(prompts), longest), self.renderer.pad_id)
        mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
        positions = torch.zeros(4, len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            begin = longest - len(prompt.input_ids)
            ids[row, begin:], mask[row, begin:] = torch.from_numpy(prompt.input_ids), 1
            positions[:, row, begin:] = torch.from_numpy(prompt.positions)
        is_padded = not bool(mask.all())
        inputs: dict[str, Any] = {
            "input_ids": ids.to(self.device),
            "attention_mask": mask.to(self.device) if is_padded else None,  # None avoids building a T x T mask
            "position_ids": (positions if self.spec is not None else positions[0]).to(self.device),
        }
        return inputs | self._pixels(prompts)

    def _pixels(self, prompts: Sequence[Sample]) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {}
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            patches = [torch.from_numpy(getattr(prompt, f"{kind}_patches")) for prompt in prompts]
            grids = [torch.from_numpy(getattr(prompt, f"{kind}_grids")).long() for prompt in prompts]
            if not sum(map(len, patches)):
                continue
            if self.spec is None:
                raise ValueError(f"the prompt has {kind}s, but this model has no vision tower; ask it about text only")
            all_patches = torch.cat(patches).to(self.device)
            inputs[name] = normalise(all_patches, spec=self.spec, dtype=self.module.model.visual.dtype)
            inputs[f"{kind}_grid_thw"] = torch.cat(grids).to(self.device)
        return inputs


def _choose(logits_BV: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> list[int]:
    if not temperature:
        best: list[int] = logits_BV.argmax(-1).tolist()
        return best
    chances_BV = (logits_BV.cpu() / temperature).softmax(-1)
    return [int(torch.multinomial(row, 1, generator=g)) for row, g in zip(chances_BV, generators, strict=True)]


def _next(positions: Tensor) -> Tensor:
    """Return the next positions: row 0 counts tokens; the rotary rows continue from the largest of the three."""
    if positions.ndim == 2:
        return positions[:, -1:] + 1
    first = positions[:1, :, -1:] + 1
    farthest = positions[1:].amax(dim=(0, 2))[None, :, None] + 1
    return torch.cat([first, farthest.expand(3, -1, -1)])


def _continued(positions: Tensor, count: int) -> Tensor:
    """Return the positions of a prompt followed by `count` tokens of text."""
    more = torch.arange(1, count + 1)
    first = positions[:1, -1:] + more
    return torch.cat([positions, torch.cat([first, (positions[1:].max() + more).expand(3, -1)])], dim=1)
