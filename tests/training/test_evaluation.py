"""Evaluation while a run trains: the numbers of transformers and PEFT, at any layout, without an effect on training."""

import json
import re
from pathlib import Path

import pytest
import torch
from eval_session import SETTING, runs
from peft import PeftModel
from PIL import Image
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForImageTextToText

from data.open import open_corpus, open_stream
from data.render.sample import Renderer
from finetune.ask.answers import find_questions
from finetune.ask.open_model import open_speaker
from finetune.ask.speaker import Sampling
from finetune.config import RunConfig
from finetune.files.tiny import write_tiny
from finetune.model.lora import PartRow
from finetune.ranks.failures import outcome_of
from finetune.ranks.log import RankLog
from finetune.ranks.watch import Watch
from finetune.settings.recipes import load_recipe
from finetune.training.evaluation import Evaluation, held_out, measured
from finetune.training.predictions import Predictions

HELD_OUT = ("eval.sources.words.path=words.jsonl", "eval.sources.seen.path=seen.jsonl", "eval.every_steps=2")
LEARN = ("schedule.steps=3", "schedule.shape=constant", "moe.balance=global", "adapters.vision_blocks.mode=frozen")
DROPOUT = ("adapters.attention.dropout=0.2", "adapters.experts.dropout=0.2")
STALE = (
    *HELD_OUT,
    "eval.every_steps=1",
    "eval.metric=words/accuracy",
    "eval.patience=1",
    "optim.lr=1e-12",
    "checkpoint.keep=1",
)


def _rows(path: Path, count: int, *, seen: bool) -> None:
    rows = []
    for number in range(count):
        words = " ".join(f"w{(number * 7 + k * k) % 13}" for k in range(3 + number % 5))
        row = {
            "messages": [
                {"role": "user", "content": ("<image>" if seen else "") + f"Say {words}."},
                {"role": "assistant", "content": f"{words} and {number % 3}."},
            ]
        }
        if seen:
            Image.new("RGB", (64, 32), (number * 30 % 255, 90, 200)).save(path.parent / f"{number}.png")
        rows.append(row | ({"images": [f"{number}.png"]} if seen else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    write_tiny(folder / "base")
    for name, count, seen in (("rows", 24, False), ("words", 11, False), ("seen", 4, True)):
        _rows(folder / f"{name}.jsonl", count, seen=seen)
    return folder


@pytest.fixture(scope="module")
def two(place: Path) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        jobs = {
            "learns": [*LEARN, *HELD_OUT, "eval.answers=2", "eval.answer_tokens=6"],
            "watched": [*LEARN, *DROPOUT, *HELD_OUT, "eval.every_steps=1"],
            "alone": [*LEARN, *DROPOUT],
            "halves": [*LEARN, *HELD_OUT, "parallel.sp=2", "data.packs_per_step=2"],
            "stale": [*LEARN, *STALE],
            "stale+again": [*LEARN, *STALE],
            "guarded": [
                *LEARN,
                *HELD_OUT,
                "eval.every_steps=1",
                "eval.sources.words.guard=stop",
                "eval.sources.words.max_kl=1e-7",
                "checkpoint.asynchronous=true",
            ],
        }
        by_rank = run_ranks(runs, 2, jobs)
    for name in jobs:
        lines = [re.findall(r"evaluation at step .*", rank[name]["said"]) for rank in by_rank]
        assert lines[0] == lines[1], "every rank has the same result"
    return by_rank[0]


def test_it_measures_the_same_as_transformers_and_peft(place: Path, two: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    first, *_, last = two["learns"]["evaluations"]
    assert [sums["step"] for sums in two["learns"]["evaluations"]] == [0, 2, 3]
    assert first["words/kl"] == first["seen/kl"] == 0.0
    assert first["words/loss"] == first["words/loss_base"]
    assert (last["words/samples"], last["seen/samples"]) == (11, 4)
    base, tuned = (AutoModelForImageTextToText.from_pretrained("base", dtype=torch.float32).eval() for _ in range(2))
    tuned = PeftModel.from_pretrained(tuned, "runs/learns/adapter").eval()
    sums, tokens = torch.zeros(4, dtype=torch.float64), 0
    for ids_T, supervised_T in _samples("words"):
        with torch.no_grad():
            z_TV, base_TV = (model(input_ids=ids_T[None]).logits[0, :-1].double() for model in (tuned, base))
        wanted_T, on_T = ids_T[1:], supervised_T[1:]
        divergence_T = kl_div(z_TV.log_softmax(-1), base_TV.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        ce_T, base_ce_T = (cross_entropy(logits, wanted_T, reduction="none") for logits in (z_TV, base_TV))
        per_T = torch.stack([ce_T, (z_TV.argmax(-1) == wanted_T).double(), base_ce_T, divergence_T], 1)
        sums += per_T[on_T].sum(0)
        tokens += int(on_T.sum())
    assert last["words/tokens"] == tokens
    wanted = (sums / tokens).tolist()
    ours = [last[f"words/{key}"] for key in ("loss", "accuracy", "loss_base", "kl")]
    assert ours == pytest.approx(wanted, rel=1e-4)
    assert ours[3] > 1e-4
    assert ours[0] < ours[2], "it learned from rows like the held-out ones"


def test_it_answers_like_the_loaded_adapter(place: Path, two: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    first, *_, last = two["learns"]["predictions"]
    assert (first["step"], last["step"]) == (0, 3)
    assert [(row["source"], row["finished"]) for row in last["rows"]] == [
        (n, False) for n in ("words", "seen") * 1 for _ in (0, 1)
    ]
    assert last["rows"][0]["wanted"].endswith(" and 0.")
    assert last["rows"][0]["question"].startswith("Say w")
    assert last["rows"][2]["question"].startswith("<image>Say w")
    speaker = open_speaker("base", adapter=Path("runs/learns/adapter"), dtype="float32")
    questions, reader = find_questions(["words=words.jsonl", "seen=seen.jsonl"])
    by_key = {(question.source, question.key): question for question in questions}
    for row in last["rows"]:
        question = by_key[row["source"], row["key"]]
        images, videos = question.media(reader)
        prompt = speaker.renderer.build(question.record, images, videos, key=question.key, prompt=True)
        (answer,) = speaker.answer([prompt], Sampling(max_tokens=6))
        assert answer.text == row["answer"]


def test_answers_need_resident_weights(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    log = RankLog(tmp_path, 0)
    watch = Watch(log, data_stall=0, step_stall=0)
    log.close()
    config, _ = load_recipe("tiny-cpu", [*SETTING, *HELD_OUT, "eval.answers=1"])
    rows = [PartRow(part="experts", mode="full", tensors=1, trained=3, total=4, lora=None)]
    for resident, why in ((False, "they do not fit on one rank"), (True, "75% of them train in full")):
        with pytest.raises(
            ValueError, match=f"eval.answers is 1, but the weights are partitioned .* because {why}: they would"
        ):
            Evaluation(
                config,
                _renderer(config),
                rows,
                base_folder=Path("base"),
                resident=resident,
                say=lambda text: None,
                watch=watch,
            )
    lines: list[str] = []
    config, _ = load_recipe("tiny-cpu", [*SETTING, *HELD_OUT, "eval.answers=1", "eval.answer_tokens=120"])
    data = held_out(config, packs_per_step=1)
    predictions = Predictions(config.eval, data, _renderer(config), stops=frozenset([1]), say=lines.append, watch=watch)
    assert not predictions.questions
    assert re.search(r"not asked: words/\S+ leaves no space for an answer in data.tokens_per_pack", lines[0])


def test_sources_that_cannot_be_measured_are_errors(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    config, _ = load_recipe("tiny-cpu", [*SETTING, "eval.sources.words.path=nowhere.jsonl"])
    with pytest.raises(ValueError, match=r"eval.sources.words.path is 'nowhere.jsonl', which does not exist"):
        open_corpus(held_out(config, packs_per_step=1), _renderer(config), section="eval")
    with pytest.raises(ValueError, match=r"eval.sources.words: no token of its samples is supervised, so .*shards"):
        measured("words", [3.0, *[0.0] * 6], True)


def _renderer(config: RunConfig) -> Renderer:
    return Renderer(Path("base"), image=config.data.image, video=config.data.video, chat=config.data.chat)


def _samples(source: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the token ids of each held-out sample alone, and which of them are supervised."""
    config, _ = load_recipe("tiny-cpu", [*SETTING, *HELD_OUT])
    renderer = _renderer(config)
    data = held_out(config, packs_per_step=1)
    stream = open_stream(data, open_corpus(data, renderer), renderer, seed=0, rank=0, size=1)
    samples = []
    for step in stream:
        for number, key in enumerate(step.batches[0].keys):
            mine = step.batches[0].sample_ids[0] == number
            if key.startswith(f"{source}/"):
                samples.append((step.batches[0].input_ids[0, mine], step.batches[0].loss_weights[0, mine] > 0))
    return samples


def test_evaluation_does_not_change_training(two: dict) -> None:
    """Compare runs with and without evaluation: dropout, router statistics and gradients are equal bit for bit."""
    assert len(two["watched"]["evaluations"]) == 4
    assert not two["alone"]["evaluations"]
    kept = ("loss", "loss_balance", "grad_norm", "tokens", "expert_load_entropy", "router_agreement")
    assert len(two["alone"]["metrics"]) == 3
    for watched, alone in zip(two["watched"]["metrics"], two["alone"]["metrics"], strict=True):
        assert {key: watched[key] for key in kept} == {key: alone[key] for key in kept}


def test_a_run_ends_early_and_keeps_its_best_state(place: Path, two: dict) -> None:
    saved = place / "runs" / "stale" / "checkpoints"
    assert sorted(path.name for path in saved.iterdir()) == ["BEST", "LATEST", "step-000001", "step-000002"]
    assert (saved / "BEST").read_text() == "step-000001\n"
    stopped = r"stopped: eval.patience=1: words/accuracy has not improved on \S+ of step 1 for 1 evaluation"
    for name in ("stale", "stale+again"):
        assert re.search(stopped, two[name]["said"])
        assert [step["step"] for step in two[name]["metrics"]] == [0, 1]
        assert "best checkpoint: runs/stale/checkpoints/step-000001" in two[name]["said"]
        last_words = two[name]["said"].rpartition("stopped (eval.patience=1: words/accuracy")[2].splitlines()
        best = "runs/stale/checkpoints/step-000001/adapter"
        assert re.search(r"\): 2 steps in 0:00:\d\d, evaluations in 0:00:\d\d; [\d,]+ useful tokens$", last_words[0])
        assert last_words[-5:] == [
            "adapter, last: runs/stale/adapter, after 2 steps",
            f"adapter, best: {best}, after 1 step",
            "next:",
            f"  moetune merge base {best} runs/stale/merged --verify",
            "  moetune eval words=words.jsonl seen=seen.jsonl --model runs/stale/merged",
        ]
    assert "resumed: runs/stale/checkpoints/step-000002" in two["stale+again"]["said"], "a finished run stays finished"
    readme = (place / "runs/stale/adapter/README.md").read_text()
    assert "the last step's; the best by eval.metric, of step 1, is checkpoints/step-000001/adapter" in readme
    config = json.loads((place / "runs/stale/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(place / "base"), "in any folder"
    assert "adapter: runs/stale/adapter, written by an earlier start" in two["stale+again"]["said"]
    assert {name: run["code"] for name, run in two.items() if run["code"]} == {"guarded": 76}
    assert outcome_of(place / "runs/guarded/logs/guarded", "") == "guarded"
    output = two["guarded"]["said"]
    assert re.search(
        r"stopped: guard words: KL\(base \|\| tuned\) is 0.0\d+, above eval.sources.words.max_kl=1e-07", output
    )
    scope = "KL(base || tuned) covers attention, experts, router, but not merger: it keeps no base values and also"
    assert f"{scope} changes the loss with adapters off" in output
    assert "step-000001 is being written" in output
    beside, last = (
        load_file(place / "runs" / "guarded" / part / "adapter_model.safetensors")
        for part in ("checkpoints/step-000001/adapter", "adapter")
    )
    assert all(torch.equal(beside[name], last[name]) for name in last)
    with safe_open(place / "runs" / "guarded" / "adapter" / "adapter_model.safetensors", "pt") as file:
        scores = json.loads(file.metadata()["moetune.scores"])
        assert file.metadata()["moetune.step"] == "1"
    assert scores["words/kl"] == two["guarded"]["evaluations"][-1]["words/kl"]


def test_a_step_is_reported_by_source_even_if_ranks_share_rows(two: dict) -> None:
    for whole, halves in zip(two["learns"]["metrics"], two["halves"]["metrics"], strict=True):
        (figures,) = whole["sources"].values()
        assert figures == pytest.approx(halves["sources"]["general"], rel=1e-4)
        assert (figures["tokens"], figures["weight"]) == (whole["tokens_nonpad"], whole["tokens_supervised"])
        assert figures["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert figures["samples"] > 1


def test_the_numbers_are_the_same_at_another_layout(place: Path, two: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (one,) = run_ranks(runs, 1, {"one": [*LEARN, *HELD_OUT, "parallel.ep=1", "parallel.resident=none"]})
    for other in (one["one"], two["halves"]):
        for ours, theirs in zip(other["evaluations"], two["learns"]["evaluations"], strict=True):
            assert ours | {"seconds": 0} == pytest.approx(theirs | {"seconds": 0}, rel=1e-4, abs=1e-7)
