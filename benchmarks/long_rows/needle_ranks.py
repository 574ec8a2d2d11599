"""Train a small MoE to find needles in rows of 4,096 tokens over several ranks, then test it on longer rows.

The needle is a marker and one of sixteen values in random filler. A question follows the haystack, and its answer is
the value. Only the answer is supervised. Samples grow from 32 tokens to 4,096, packed into rows of one length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness.rows import text_row
from benchmarks.harness.spawned import on_ranks
from data.stream.batch import Batch
from finetune.architecture.families import Rope
from finetune.architecture.yarn import Extension, extended_rope, rotary

FILLER = 40
"""Tokens below this one are filler."""
MARKER = 40
VALUE = 41
"""The first of the value tokens."""
VALUES = 16
QUESTION = 60
VOCAB = 64
NATIVE = 4096
THETA = 10_000.0
HEAD_DIM = 16
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class Course:
    """The training course: `stages` are (length of samples, steps) in order; all rows have the last length."""

    sp: int
    stages: tuple[tuple[int, int], ...] = ((32, 60), (128, 40), (1024, 40), (4096, 90))
    rate: float = 5e-3
    trials: int = 8
    """Haystacks per depth."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Share of needles found, by depth."""

    length: int
    factor: float
    shares: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the depths."""
        return sum(self.shares) / len(self.shares)


def train_and_probe(course: Course, probes: Sequence[tuple[int, float]]) -> list[Score]:
    """Train over `course.sp` ranks, then score each probe (length, YaRN factor)."""
    scores: list[Score] = on_ranks(course.sp, _train_and_score, course, tuple(probes))[0]
    return scores


def _train_and_score(course: Course, probes: Sequence[tuple[int, float]]) -> list[Score]:
    """Train on every rank; score on the first one only."""
    model = _train(course)
    return [_score(model, length, factor, course.trials) for length, factor in probes] if dist.get_rank() == 0 else []


def _train(course: Course) -> Any:
    from finetune.model.forward import PackedModel
    from finetune.model.sequence import sequence_group
    from finetune.model.sequence_attention import use_sequence
    from finetune.ranks.engine import start_distributed
    from finetune.training.setup import share_rows

    start_distributed()
    model = _model()
    use_sequence(model, [course.sp], "segments")
    packed = PackedModel(model, spec=None)
    share_rows(packed, None, sequence_group(course.sp))
    packed.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=course.rate, betas=(0.9, 0.95), weight_decay=0.0)
    steps, row_tokens = sum(count for _, count in course.stages), course.stages[-1][0]
    number = 0
    for length, count in course.stages:
        for _ in range(count):
            batch = _row(row_tokens // length, length, seed=number)
            rate = course.rate * min(1.0, (number + 1) / 20) * max(0.1, 1 - number / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = packed(batch=batch).objective / len(batch.keys)
            loss.backward()
            for parameter in trained:
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)  # each label counts on one rank, so the row's gradient is the sum
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            number += 1
    share_rows(packed, None, None)
    return model.eval()


@torch.no_grad()
def _score(model: Any, length: int, factor: float, trials: int) -> Score:
    """Score haystacks one by one, as unshared rows, with positions stretched by the factor."""
    _stretch(model, factor)
    shares = []
    for number, depth in enumerate(DEPTHS):
        right = 0
        for trial in range(trials):
            batch = _row(1, length, seed=10**6 + 1000 * number + trial, depth=depth)
            out = model.model(
                input_ids=batch.input_ids,
                position_ids=batch.positions[0],
                use_cache=False,
                attention_mask=None,
                **batch.attention,
            )
            logits_V = model.lm_head(out.last_hidden_state[0, -2])
            right += int(logits_V.argmax()) == int(batch.input_ids[0, -1])
        shares.append(right / trials)
    return Score(length=length, factor=factor, shares=tuple(shares))


def _stretch(model: Any, factor: float) -> None:
    rope = Rope(theta=THETA, mrope_section=(4, 2, 2))
    if factor > 1:
        rope = extended_rope(rope, Extension(factor=factor, original=NATIVE, length=int(NATIVE * factor)))
    tables = rotary(rope, HEAD_DIM)
    model.model.rotary_emb.inv_freq.copy_(torch.tensor(tables.inv_freq))
    model.model.rotary_emb.attention_scaling = tables.scaling


def _model() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moe.parallel import LayerOptions, replace_moe_blocks
    from moe.router import RouterOptions

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        num_experts=4,
        moe_intermediate_size=48,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=NATIVE,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )
    model = Qwen3MoeForCausalLM(config)
    options = LayerOptions(experts="full", router=RouterOptions(mode="full"), resident=False)
    replace_moe_blocks(model, ep_size=1, options=options)
    with torch.no_grad():
        for layer in model.model.layers:  # normed heads start with small scores, too even over 4,096 tokens
            layer.self_attn.q_norm.weight.fill_(2.0)
            layer.self_attn.k_norm.weight.fill_(2.0)
    return model


def _row(samples: int, length: int, *, seed: int, depth: float | None = None) -> Batch:
    """Build a row of haystacks of one length: filler with a needle, the question, the answer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, FILLER, (samples, length), generator=generator)
    value = torch.randint(VALUE, VALUE + VALUES, (samples,), generator=generator)
    at = torch.randint(0, length - 4, (samples,), generator=generator)
    if depth is not None:
        at = torch.full((samples,), round(depth * (length - 5)))
    rows = torch.arange(samples)
    ids[rows, at], ids[rows, at + 1] = MARKER, value
    ids[:, -2], ids[:, -1] = QUESTION, value
    weights = torch.zeros(samples, length)
    weights[:, -1] = 1
    return text_row(ids.unbind(), weights.unbind())
