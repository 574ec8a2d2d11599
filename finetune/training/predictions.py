"""Answers of the model to a few held-out questions while it trains: greedy, up to a limit of tokens.

All ranks answer the same questions at the same time, so that each calls the engine equally often. Packed rows have no
cache of keys: a row is run again for each token, on the same path as in training. That costs a forward per token, so
weights must be resident: partitioned ones would be gathered for each token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.config import DataConfig
from data.open import find_sources
from data.render.sample import Renderer, Sample
from data.shards.bytes import places_of
from data.shards.questions import Question, read_questions
from data.shards.reader import SampleReader
from data.stream.batch import collate
from finetune.config import EvalConfig
from finetune.model.forward import PackedModel
from finetune.model.row import Row
from finetune.ranks.collectives import rank_and_world, require_no_wish, sum_over_ranks
from finetune.ranks.watch import Watch


@dataclass(frozen=True, kw_only=True)
class HeldOutQuestion:
    """One question, and the sample that the model reads."""

    source: str
    question: Question
    sample: Sample


class Predictions:
    """The questions of one run: the first few of each source. Every rank must make one and call it at equal steps."""

    def __init__(
        self,
        config: EvalConfig,
        data: DataConfig,
        renderer: Renderer,
        *,
        stops: frozenset[int],
        say: Callable[[str], None],
        watch: Watch,
    ) -> None:
        """`stops` are the tokens that end an answer."""
        self._config, self._budget = config, data.tokens_per_pack
        self._renderer, self._stops = renderer, stops
        self._watch = watch
        self.questions: list[HeldOutQuestion] = []
        reader = SampleReader(cache_dir=Path(data.cache_dir) if data.cache_dir else None, places=places_of(data))
        for source, shards in find_sources(data, section="eval").items():
            for question in list(read_questions(shards, reader, source=source))[: config.answers]:
                images, videos = question.media(reader)
                sample = renderer.build(question.record, images, videos, key=question.key, prompt=True)
                if len(sample.input_ids) + config.answer_tokens > self._budget:
                    say(f"not asked: {source}/{question.key} leaves no space for an answer in data.tokens_per_pack")
                    continue
                self.questions.append(HeldOutQuestion(source=source, question=question, sample=sample))
        reader.bytes.close()

    def rows(self, engine: Any, device: torch.device) -> list[Mapping[str, Any]]:
        """Answer all questions, and return each answer with its reference; every rank must call this."""
        rows: list[Mapping[str, Any]] = []
        for packed in self._packed():
            for held_out, ids in zip(packed, self._answered(engine, packed, device), strict=True):
                rows.append(
                    {
                        "source": held_out.source,
                        "key": held_out.question.key,
                        "question": held_out.question.text,
                        "wanted": held_out.question.references[0],
                        "answer": self._renderer.decode(ids),
                        "finished": len(ids) < self._config.answer_tokens,
                    }
                )
        return rows

    def _packed(self) -> list[list[HeldOutQuestion]]:
        """Put as many questions into each row as fit with their answers."""
        rows: list[list[HeldOutQuestion]] = []
        room = 0
        for question in self.questions:
            tokens = len(question.sample.input_ids) + self._config.answer_tokens
            if tokens > room:
                rows.append([])
                room = self._budget
            rows[-1].append(question)
            room -= tokens
        return rows

    def _answered(self, engine: Any, packed: Sequence[HeldOutQuestion], device: torch.device) -> list[list[int]]:
        """Return the tokens of each answer of a row, without the token that ends it."""
        samples = [question.sample for question in packed]
        answers: list[list[int]] = [[] for _ in samples]
        ended = [False] * len(samples)
        for _ in range(self._config.answer_tokens):
            batch = collate(
                samples,
                keys=[question.question.key for question in packed],
                pad_id=self._renderer.pad_id,
                multiple=1,
                widths=self._renderer.patch_widths,
            )
            tokens = engine(batch=batch, measure=next_tokens).tolist()
            require_no_wish(self._watch.stop, device)
            for at, token in enumerate(tokens):
                ended[at] = ended[at] or token in self._stops
                if not ended[at]:
                    answers[at].append(token)
                samples[at] = longer(samples[at], token)
            # ranks may round differently: all of them stop when all have ended
            if sum_over_ranks([float(all(ended))], device)[0] == rank_and_world()[1]:
                break
        return answers


@torch.no_grad()
def next_tokens(packed: PackedModel, row: Row) -> Tensor:
    """Return the likeliest next token after each sample of a complete row; every rank must call this."""
    batch = row.batch
    assert row.part == slice(0, batch.input_ids.shape[1])
    ends_S = batch.cu_seq_lens[1 : len(batch.keys) + 1].long() - 1
    chosen_S: Tensor = packed.model.lm_head(packed.hidden(row)[ends_S]).argmax(-1)
    return chosen_S


def longer(sample: Sample, token: int) -> Sample:
    """Append a token of text to a sample; its rotary positions continue from the largest one."""
    positions = sample.positions
    next_position = np.array([positions[0, -1] + 1, *[positions[1:].max() + 1] * 3], dtype=positions.dtype)
    return replace(
        sample,
        input_ids=np.append(sample.input_ids, np.array(token, dtype=sample.input_ids.dtype)),
        loss_weights=np.append(sample.loss_weights, np.array(0, dtype=sample.loss_weights.dtype)),
        positions=np.concatenate([positions, next_position[:, None]], axis=1),
    )
