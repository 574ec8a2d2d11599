"""The demo's material and recipes are valid; the slow suite runs the complete demo and checks what it learned."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from limits import LIMIT_S
from PIL import Image
from sklearn.datasets import load_digits
from starts import environment

from finetune.settings.recipes import load_recipe
from launchers.cli import COMMANDS as KNOWN
from launchers.cli import main
from launchers.demo import COMMANDS
from launchers.demo_material import HELD_OUT, LETTERS, picture_lines, write_material


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    write_material(folder, letters=40)
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_held_out_digits_come_from_scikit_learn_and_are_not_trained_on(material: Path) -> None:
    digits = load_digits()
    held_out, train = rows(material / "held-out.jsonl"), rows(material / "train.jsonl")
    names = [row["images"][0] for row in held_out + train]
    assert (len(held_out), len(set(names))) == (HELD_OUT, len(digits.images))
    for row in (held_out[0], train[-1]):
        at = int(Path(row["images"][0]).stem)
        cells = np.asarray(Image.open(material / row["images"][0]))[4::8, 4::8, 0]
        assert np.abs(cells / 15.9375 - digits.images[at]).max() < 0.1
        assert row["messages"][-1]["content"] == str(digits.target[at])


def test_the_base_sees_letters_only(material: Path) -> None:
    seen = [row["messages"][-1]["content"] for row in rows(material / "letters.jsonl") if "images" in row]
    assert set(seen) == set(LETTERS)
    texts = [row for row in rows(material / "letters.jsonl") if row["messages"][-1]["content"].isdigit()]
    assert texts
    assert not any("images" in row for row in texts)
    shown = picture_lines(material / "letters" / "0.png")
    assert len(shown) == 8
    assert any("@" in line for line in shown)


@pytest.mark.parametrize("recipe", ["base.yaml", "digits.yaml"])
def test_recipes_have_no_problems(material: Path, recipe: str) -> None:
    assert load_recipe(str(material / recipe))[1] == []


def test_every_command_of_the_demo_exists() -> None:
    assert {command.split()[0] for command in COMMANDS} <= set(KNOWN)


def test_an_existing_folder_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(tmp_path)]) == 2
    assert "exists; give another folder, or remove it" in capsys.readouterr().err


def test_missing_digits_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"digits come with scikit-learn: pip install 'moetune\[demo\]'"):
        main(["demo", "--debug", str(tmp_path / "out")])


@pytest.mark.slow
def test_the_complete_demo_learns_digits(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launchers.cli", "demo", "shown"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=2 * LIMIT_S)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for line in ("base, before", "base + adapter, after", "after, images shuffled", "the digit shown is a"):
        assert line in done.stdout
