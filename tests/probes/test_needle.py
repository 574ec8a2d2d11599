"""Needles: haystacks of the requested length, needles at the requested depth, and the scores of a model."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from bases import base
from PIL import Image

from data.config import ChatConfig, ImageConfig, VideoConfig
from data.render.sample import Renderer
from finetune.ask.speaker import Judged
from finetune.probes.colours import COLOURS
from finetune.probes.needle import count_tokens, fitted, probe, video_haystack
from launchers.cli import main


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(base(), image=ImageConfig(), video=VideoConfig(), chat=ChatConfig())


class Knowing:
    """Stands in for a loaded model that knows only the needles in the first half of its prompt."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer

    def judge(self, prompt, continuation):  # type: ignore[no-untyped-def]
        at = self.renderer.decode(prompt.input_ids).find("The secret number")
        knows = 0 <= at < len(self.renderer.decode(prompt.input_ids)) / 2
        return [Judged(chosen=0.0, best=0.0, best_id=token if knows else -1) for token in continuation]


@pytest.mark.parametrize(("kind", "lengths"), [("text", (600, 2000)), ("video", (200, 900))])
def test_a_haystack_fills_its_length(renderer: Renderer, kind: str, lengths: tuple[int, ...]) -> None:
    for length in lengths:
        haystack = fitted(kind, length, 0.5, seed=3, renderer=renderer)
        tokens = count_tokens(haystack, renderer)
        assert length - 80 <= tokens <= length
        prompt = haystack.prompt(renderer).input_ids
        assert tokens - 16 <= len(prompt) < tokens
        assert renderer.decode(prompt).count(haystack.answer) == (1 if kind == "text" else 0), "only in the needle"
    with pytest.raises(ValueError, match=f"a {kind} needle does not fit in 20 tokens; the shortest haystack takes"):
        fitted(kind, 20, 0.5, seed=3, renderer=renderer)


def test_a_needle_lies_at_its_depth(renderer: Renderer) -> None:
    for depth in (0.0, 0.25, 1.0):
        haystack = fitted("text", 1500, depth, seed=1, renderer=renderer)
        text = renderer.decode(haystack.prompt(renderer).input_ids)
        sentences = re.findall(r"The [^.]*\.", text)
        (at,) = (n for n, sentence in enumerate(sentences) if f"is {haystack.answer}." in sentence)
        assert at == round(depth * (len(sentences) - 1))
        clip = video_haystack(20, depth, seed=1).clips[0].frames
        pixels = [np.asarray(Image.open(io.BytesIO(frame))) for frame in clip]
        coloured = [n for n, frame in enumerate(pixels) if np.ptp(frame.reshape(-1, 3).mean(0)) > 50]
        assert coloured == [first := 2 * min(round(depth * 10), 9), first + 1]
        assert tuple(pixels[first][0, 0]) == COLOURS[video_haystack(20, depth, seed=1).answer]
    again = fitted("text", 1500, 1.0, seed=1, renderer=renderer)
    assert again == haystack, "the same seed gives the same haystack"


def test_scores_are_grouped_by_length_and_depth(renderer: Renderer) -> None:
    cells = list(probe(Knowing(renderer), "text", lengths=(700,), depths=(0.0, 1.0), trials=2, seed=0))
    scores = {cell.depth: (cell.length, cell.found, cell.right_tokens) for cell in cells}
    assert scores == {0.0: (700, 1.0, 1.0), 1.0: (700, 0.0, 0.0)}
    assert 600 < cells[0].tokens < 700


def test_a_tiny_model_is_probed_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--lengths", "300", "--depths", "0,1", "--trials", "1", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["probe", "needle", str(base()), *words]) == 0
    assert "model, text, 300 tokens, depth 0%: found" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "needle.json").read_text())
    depths = {kind: [cell["depth"] for cell in models["model"]] for kind, models in content["kinds"].items()}
    assert depths == {"text": [0.0, 1.0], "video": [0.0, 1.0]}
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["needle-text.png", "needle-video.png"]
    assert main(["probe", "needle", str(base()), *words]) == 2
    assert "needle.json exists from an earlier probe, and is not overwritten" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["probe", "needle", str(base()), "--depths", "2"])
    assert "it must be numbers from 0 to 1" in capsys.readouterr().err
