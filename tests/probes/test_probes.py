"""Probes: what they show is made from a seed, what they take away is gone only for a while, what they write is read."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bases import base
from PIL import Image

from data.render.timestamps import Stamps
from finetune.ask.open_model import open_speaker
from finetune.ask.speaker import Speaker
from finetune.files.tiny import TinyModel, write_tiny
from finetune.probes import balance, deepstack, order, resolution, timestamps
from finetune.probes.colours import COLOURS, GREY
from finetune.probes.effects import deepstack_levels, stamped
from finetune.probes.letters import letter_trial
from finetune.probes.picture import CELL, LEFT, TOP, Grid, colour, draw_grids
from finetune.probes.score import Score, table
from finetune.probes.timestamps import RATES, time_trial
from finetune.probes.trial import Trial, is_right
from launchers.cli import main
from moe.parallel import ExpertParallelMoe


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return open_speaker(str(base()))


def _logits(speaker: Speaker, trial: Trial) -> float:
    return speaker.judge(trial.prompt(speaker.renderer), speaker.renderer.encode(trial.answer))[0].chosen


def _colours(trial: Trial) -> list[str]:
    names = {colour: name for name, colour in COLOURS.items()} | {GREY: "grey"}
    pixels = [np.asarray(Image.open(io.BytesIO(frame)))[0, 0] for frame in trial.clips[0].frames]
    return [names[tuple(int(value) for value in pixel)] for pixel in pixels]


def test_what_is_shown_is_made_from_the_seed_alone() -> None:
    for make in (
        lambda seed: letter_trial(12, side=64, seed=seed),
        lambda seed: order.order_trial("last", seed=seed, side=32),
        lambda seed: time_trial("when", None, "seconds", seed=seed, side=32),
    ):
        trials = [make(seed) for seed in range(12)]
        assert trials == [make(seed) for seed in range(12)]
        assert len({trial.answer for trial in trials}) > 2


def test_the_answer_of_an_order_is_the_colour_at_that_end_and_shuffling_keeps_moments_and_times() -> None:
    moved = 0
    for seed in range(20):
        trial = order.order_trial("first", seed=seed, side=32)
        names = _colours(trial)
        assert trial.answer == names[0]
        assert order.order_trial("last", seed=seed, side=32).answer == names[-1]
        mixed = order.shuffled(trial, seed=seed)
        assert sorted(_colours(mixed)) == sorted(names)
        assert _colours(mixed)[::2] == _colours(mixed)[1::2], "the two frames of a moment stay together"
        assert mixed.clips[0].times == trial.clips[0].times
        moved += _colours(mixed)[0] != trial.answer
    assert moved > 5


@pytest.mark.parametrize("form", ["seconds", "hms", "mixed"])
def test_the_right_time_stands_in_the_text_before_the_colour(speaker: Speaker, form: Stamps) -> None:
    renderer = speaker.renderer.with_stamps(form)
    for rate in RATES.values():
        for seed in range(6):
            trial = time_trial("when", rate, form, seed=seed, side=32)
            text = "".join(renderer.spell(token) for token in trial.prompt(renderer).input_ids)
            stamps = [part.rpartition("<")[2] for part in text.split("><|vision_start|><|video_pad|>")[:-1]]
            shown = trial.question.split()[4].rstrip("?")
            times = [time for time, name in zip(stamps, _colours(trial)[::2], strict=True) if name == shown]
            assert trial.answer == f"{times[0]} to {times[-1]}"
            assert len(times) == 2
            asked = time_trial("what at", rate, form, seed=seed, side=32)
            time = asked.question.partition(" at ")[2].partition("?")[0]
            at = {name for stamp, name in zip(stamps, _colours(asked)[::2], strict=True) if stamp == time}
            assert at == {asked.answer}


def test_stamps_leave_the_text_only_inside_the_block(speaker: Speaker) -> None:
    trial = time_trial("when", 1.0, "seconds", seed=1, side=32)
    whole = speaker.renderer.decode(trial.prompt(speaker.renderer).input_ids)
    with stamped(speaker, "none"):
        bare = speaker.renderer.decode(trial.prompt(speaker.renderer).input_ids)
    assert whole.count(" seconds>") == 6
    assert bare.count(" seconds>") == 0
    assert speaker.renderer.decode(trial.prompt(speaker.renderer).input_ids) == whole


def test_each_level_counts_and_is_back_after_the_block(tmp_path: Path) -> None:
    write_tiny(
        tmp_path / "base", TinyModel(layers=4)
    )  # after the last of three layers, the third level would be unread
    speaker = open_speaker(str(tmp_path / "base"))
    trial = letter_trial(20, side=64, seed=3)
    levels = range(len(speaker.module.model.visual.deepstack_merger_list))
    on = _logits(speaker, trial)
    seen = []
    for kept in ((), *((level,) for level in levels), tuple(levels)):
        with deepstack_levels(speaker, kept):
            seen.append(_logits(speaker, trial))
    assert seen[-1] == on
    assert len(set(seen)) == len(seen), "off, each level alone, and all of them differ"
    with pytest.raises(RuntimeError, match="stops"), deepstack_levels(speaker, ()):
        raise RuntimeError("stops")
    assert _logits(speaker, trial) == on


def test_fewer_pixels_reach_the_tower(speaker: Speaker) -> None:
    patches = [
        len(letter_trial(20, side=256, seed=3, max_pixels=round(share * 256**2)).prompt(speaker.renderer).image_patches)
        for share in resolution.SHARES.values()
    ]
    assert patches == [256, 100, 64, 16]


def test_scores_are_yielded_with_each_effect(speaker: Speaker) -> None:
    scores = list(deepstack.probe(speaker, heights=(8, 24), side=64, trials=1, seed=0))
    assert [(score.row, score.column) for score in scores[:5]] == [
        ("8 px", column) for column in ("on", "off", "level 1 alone", "level 2 alone", "level 3 alone")
    ]
    assert len(scores) == 10
    columns = {score.column for score in order.probe(speaker, side=32, trials=1, seed=0)}
    assert columns == {"in order", "shuffled"}
    times = list(timestamps.probe(speaker, side=32, trials=1, seed=0))
    assert len({score.row for score in times}) == len(RATES) * 3
    assert len({score.column for score in times}) == 6
    shares = list(resolution.probe(speaker, heights=(24,), side=64, trials=1, seed=0))
    assert [score.column for score in shares] == list(resolution.SHARES)
    assert {score.value for score in (*scores, *times, *shares)} == {0.0}, "weights are random"


@pytest.mark.parametrize("dead", [(1, 5), (2, 0)])
def test_balance_names_the_expert_whose_logit_is_minus_infinity(dead: tuple[int, int]) -> None:
    speaker = open_speaker(str(base()))
    before = balance.probe(speaker, trials=4, seed=0, side=64)
    assert [load.kind for load in before] == ["all", "text", "image", "video", "other"]
    assert not any(before[0].dead), "each expert of the untouched model gets tokens"
    assert before[0].tokens == sum(load.tokens for load in before[1:])
    for load in before:
        assert all(sum(counts) == 2 * load.tokens for counts in load.load.counts), "two experts a token"
    layers = [module for module in speaker.module.modules() if isinstance(module, ExpertParallelMoe)]
    layer, expert = dead

    def close(gate: object, args: object, out: tuple[torch.Tensor, None]) -> tuple[torch.Tensor, None]:
        return out[0].index_fill(1, torch.tensor([expert]), -torch.inf), None

    layers[layer].gate.register_forward_hook(close)
    after = balance.probe(speaker, trials=4, seed=0, side=64)
    assert after[0].dead == tuple((expert,) if at == layer else () for at in range(len(layers)))
    assert balance.load_lines(after)[-1] == f"without any token: layer {layer}: experts {expert}"
    assert all(module.balance is None for module in layers)


def test_a_model_without_experts_or_tower_is_refused(
    speaker: Speaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blind = Speaker(
        speaker.module, renderer=speaker.renderer, spec=None, stops=speaker.stops, device=torch.device("cpu")
    )
    with pytest.raises(ValueError, match="this model has no vision tower, so it sees no pictures"):
        list(deepstack.probe(blind, heights=(8,), side=64, trials=1, seed=0))
    write_tiny(tmp_path / "dense", TinyModel(experts=None))
    assert main(["probe", "balance", str(tmp_path / "dense"), "--device", "cpu"]) == 2
    assert "this model is dense, so it has no experts" in capsys.readouterr().err


def test_the_picture_shows_each_score_in_its_cell(tmp_path: Path) -> None:
    scores = [
        Score(row=row, column=column, value=value, trials=1)
        for row, column, value in (("a", "on", 0.0), ("a", "off", 1.0), ("b", "on", 0.5), ("b", "off", 0.25))
    ]
    assert table(scores) == ["     on   off", "a  0.00  1.00", "b  0.50  0.25"]
    left = Grid(title="l", rows=["a", "b"], columns=["on", "off"], values=[[0.0, 1.0], [0.5, 0.25]])
    right = Grid(
        title="r",
        rows=["0"],
        columns=list(map(str, range(20))),
        values=[[number / 10 for number in range(20)]],
        top=2.0,
    )
    draw_grids([left, left], tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as file:
        image = file.convert("RGB")
    corners = [(LEFT + 2 + CELL[0] * x, TOP + 2 + CELL[1] * y) for y in (0, 1) for x in (0, 1)]
    assert [image.getpixel(corner) for corner in corners] == [colour(value) for value in (0.0, 1.0, 0.5, 0.25)]
    beside = [(x + image.width // 2, y) for x, y in corners]
    assert [image.getpixel(corner) for corner in beside] == [image.getpixel(corner) for corner in corners]
    draw_grids([right, right], tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as file:
        below = file.convert("RGB")
    places = [(LEFT + 12 * x + 2, TOP + 2 + y * below.height // 2) for y in (0, 1) for x in (0, 10, 19)]
    assert [below.getpixel(place) for place in places] == 2 * [colour(x / 20) for x in (0, 10, 19)]


def test_an_answer_is_right_up_to_case_and_a_full_stop() -> None:
    assert all(is_right(answer, "red") for answer in ("red", "Red.", " RED\n"))
    assert not any(is_right(answer, "red") for answer in ("", "green", "red and green"))


@pytest.mark.parametrize("name", ["timestamps", "deepstack", "order", "resolution", "balance"])
def test_a_tiny_model_is_probed_from_the_command_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heights = ["--heights", "12"] if name in ("deepstack", "resolution") else []
    words = [
        "probe",
        name,
        str(base()),
        "--trials",
        "1",
        "--side",
        "64",
        *heights,
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "model:" in printed
    assert f"wrote {tmp_path / name}.json, {name}.png" in printed
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert set(content) >= {"model", "adapter", "seed", "trials", "side", "models"}
    assert list(content["models"]) == ["model"]
    with Image.open(tmp_path / f"{name}.png") as image:
        assert image.width > 100
    assert main(words) == 2
    assert f"{name}.json exists from an earlier probe, and is not overwritten" in capsys.readouterr().err
