"""Consequences of an evaluation, errors of `eval:`, and the tiles of its computation."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from data.config import SourceConfig
from finetune.config import AdaptersConfig, DensePartConfig, EvalConfig, EvalSourceConfig, ParallelConfig, RunConfig
from finetune.model.divergence import compare_tiles
from finetune.settings.check_evaluation import eval_problems
from finetune.training.evaluation import held_out
from finetune.training.verdict import Judge, Measured


def _found(loss: float, *, accuracy: float = 0.5, kl: float | None = 0.0) -> dict[str, Measured]:
    base = None if kl is None else 2.0
    return {"a": Measured(samples=2, tokens=9, loss=loss, accuracy=accuracy, loss_base=base, kl=kl)}


def _config(**changes: Any) -> EvalConfig:
    source = {key: changes.pop(key) for key in ("guard", "max_kl", "max_loss_rise") if key in changes}
    return EvalConfig(**{"sources": {"a": EvalSourceConfig(path="held", **source)}} | changes)


BETTER = {
    "a/loss": ((3, 2, 2, 1), (0, 0, 0, 0)),
    "a/accuracy": ((1, 1, 1, 1), (0.1, 0.2, 0.2, 0.3)),
}


@pytest.mark.parametrize("metric", BETTER)
def test_the_best_evaluation_is_the_first_of_equals_but_never_that_before_training(metric: str) -> None:
    losses, accuracies = BETTER[metric]
    judge = Judge(_config(metric=metric))
    assert not judge.judge(0, _found(0.1, accuracy=0.9)).is_best, "nothing is learned yet"
    pairs = zip(losses, accuracies, strict=True)
    verdicts = [judge.judge(step, _found(loss, accuracy=hits)) for step, (loss, hits) in enumerate(pairs, 1)]
    assert [verdict.is_best for verdict in verdicts] == [True, True, False, True]
    assert judge.best["step"] == 4
    assert verdicts[-1].stop is None, "patience 0 waits forever"


def test_patience_also_ends_a_resumed_run() -> None:
    config = _config(metric="a/loss", patience=2)
    judge = Judge(config)
    stops = [judge.judge(step, _found(loss)).stop for step, loss in enumerate((9, 5, 6, 5.5))]
    assert stops[:3] == [None, None, None]
    words = "eval.patience=2: a/loss has not improved on 5.0000 of step 1 for 2 evaluations"
    assert stops[3] == words
    again = Judge(config)
    again.load_state_dict({})
    assert again.stop() is None
    again.load_state_dict(judge.state_dict())
    assert again.stop() == words
    more = Judge(_config(metric="a/loss", patience=3))
    more.load_state_dict(judge.state_dict())
    assert more.stop() is None, "more patience goes on"
    other = Judge(_config(metric="a/kl", patience=2))
    other.load_state_dict(judge.state_dict())
    assert other.stop() is None
    assert other.judge(5, _found(7, kl=3.0)).is_best, "another metric begins again"


@pytest.mark.parametrize(
    ("bound", "text"),
    [
        ({"max_kl": 0.1}, r"guard a: KL\(base \|\| tuned\) is 0.2000, above eval.sources.a.max_kl=0.1"),
        ({"max_loss_rise": 0.5}, r"guard a: the loss rose by 1.0000, above eval.sources.a.max_loss_rise=0.5"),
    ],
)
def test_a_guard_flags_or_stops(bound: dict[str, float], text: str) -> None:
    for guard in ("flag", "stop"):
        judge = Judge(_config(guard=guard, **bound))
        assert judge.judge(0, _found(3.0)).sentences == ()
        verdict = judge.judge(2, _found(4.0, kl=0.2))
        assert re.search(text, verdict.sentences[0])
        assert (verdict.stop is not None) == (guard == "stop")
        looser = Judge(_config(guard=guard, **{key: 9.0 for key in bound}))
        looser.load_state_dict(judge.state_dict())
        assert looser.stop() is None
        assert judge.judge(4, _found(3.0)).stop is None, "back within the bound"
    assert not Judge(_config()).judge(2, _found(float("nan"), kl=9.0)).sentences
    assert Judge(_config(guard="flag", max_kl=1.0)).judge(2, _found(1.0, kl=float("nan"))).sentences, "NaN is beyond"


def _run(evaluation: EvalConfig, *, lora: bool = True, trained_on: str = "other") -> RunConfig:
    attention = DensePartConfig(mode="lora" if lora else "full")
    sources = {"general": SourceConfig(path=trained_on)}
    config = RunConfig(eval=evaluation, adapters=AdaptersConfig(attention=attention))
    return RunConfig(**vars(config) | {"data": type(config.data)(sources=sources)})


def _parallel(**changes: Any) -> RunConfig:
    return replace(_run(_config(answers=2)), parallel=ParallelConfig(**changes))


GUARDED: dict[str, Any] = {"guard": "flag", "max_kl": 1.0}
WRONG: dict[str, tuple[RunConfig, str]] = {
    "steps": (_run(_config(every_steps=-1)), r"eval.every_steps = -1: it must be at least 0"),
    "patience": (
        _run(_config(patience=2)),
        r"eval.patience = 2: it counts evaluations without a better eval.metric, which is not set. Set eval.metric=",
    ),
    "source": (
        _run(_config(metric="b/loss")),
        r"eval.metric = 'b/loss': it must be <source>/loss.*Use one of a/loss, a/accuracy",
    ),
    "quantity": (_run(_config(metric="a/los")), r"eval.metric = 'a/los': .*Use one of a/loss"),
    "none": (_run(EvalConfig(metric="a/loss")), r"Add eval.sources.<name>.path=..., or drop eval.metric"),
    "kl": (_run(_config(metric="a/kl"), lora=False), r"eval.metric = 'a/kl': no part trains in mode lora, so.*a/loss"),
    "bound": (
        _run(_config(guard="stop")),
        r"eval.sources.a.guard = 'stop': the source has no bound. Set .*a.max_kl or",
    ),
    "guard": (_run(_config(max_kl=1.0)), r"eval.sources.a.max_kl = 1.0: no guard reads it. Set .*guard to flag"),
    "range": (
        _run(_config(guard="flag", max_loss_rise=-1.0)),
        r"max_loss_rise = -1.0: it must be a finite number of 0 or more",
    ),
    "no lora": (_run(_config(**GUARDED), lora=False), r"max_kl = 1.0: no part .*Set .*max_loss_rise"),
    "answers": (
        _run(EvalConfig(answers=1)),
        r"eval.answers = 1: there is no held-out source to ask about. Add eval.sou",
    ),
    "cap": (_run(_config(answer_tokens=0)), r"eval.answer_tokens = 0: it must be at least 1"),
    "partitioned": (_parallel(resident="none"), r"eval.answers = 2: partitioned weights would be .*resident=frozen"),
    "shared rows": (_parallel(sp=2), r"eval.answers = 2: ranks that share a row .*or set sp=1"),
    "name": (_run(EvalConfig(sources={"a/b": EvalSourceConfig(path="x")})), r"eval.sources.a/b = .*without /"),
    "trained on": (_run(_config(), trained_on="held"), r"held': data.sources.general trains on the same path"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_invalid_settings_are_found_by_check(wrong: str) -> None:
    config, text = WRONG[wrong]
    (problem,) = eval_problems(config)
    assert (problem.level == "warning") == (wrong == "trained on")
    assert re.search(text, str(problem))


def test_a_valid_section_has_no_problems_and_reads_each_sample_once() -> None:
    config = _run(_config(metric="a/kl", patience=1, guard="stop", max_kl=0.2))
    assert eval_problems(config) == []
    data = held_out(config, packs_per_step=3)
    assert (data.remainder, data.mixture, data.packs_per_step) == ("keep", "natural", 3)
    assert {name: source.path for name, source in data.sources.items()} == {"a": "held"}


@pytest.mark.parametrize("tile_bytes", [1, 12 * 50 * 4, 1 << 30])
def test_tiles_give_the_same_as_full_logits(tile_bytes: int) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden_ND, base_ND = (torch.randn(11, 8, generator=generator) for _ in range(2))
    weight_VD, labels_N = torch.randn(50, 8, generator=generator), torch.arange(11)
    ce_N, hits_N, base_ce_N, kl_N = compare_tiles(hidden_ND, weight_VD, tile_bytes, base_ND=base_ND, labels_N=labels_N)
    tuned, base = ((x @ weight_VD.T).double() for x in (hidden_ND, base_ND))
    wanted = kl_div(tuned.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_N.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ce_N.double(), cross_entropy(tuned, labels_N, reduction="none"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        base_ce_N.double(), cross_entropy(base, labels_N, reduction="none"), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(hits_N, tuned.argmax(-1) == labels_N)
    alone = compare_tiles(hidden_ND, weight_VD, tile_bytes, base_ND=None, labels_N=labels_N)
    assert torch.equal(alone[0], ce_N)
    assert not alone[3].any()
    assert all(
        not len(part) for part in compare_tiles(hidden_ND[:0], weight_VD, 9, base_ND=None, labels_N=labels_N[:0])
    )
