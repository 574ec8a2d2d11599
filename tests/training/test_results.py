"""Results of a run: the newer adapter takes the earlier one's place when it is complete, and the user's files stay."""

from pathlib import Path

import pytest
from adapter_cases import DENSE, made
from bases import base

from data.config import DataConfig, ImageConfig
from finetune.adapters.keys import WEIGHTS
from finetune.adapters.provenance import Provenance
from finetune.config import AdaptersConfig, DensePartConfig, RunConfig
from finetune.files.atomic import REPLACED
from finetune.files.basefiles import open_base
from finetune.files.tensorfile import read_header
from finetune.model.weights import load_weights
from finetune.settings.recipes import effective
from finetune.training.results import write_learned


def learned(config: AdaptersConfig, folder: Path, steps: range) -> list[str]:
    empty, files = made(base(), config), open_base(base())
    load_weights(empty, open_base(base(), empty.expected, layout="auto"))
    lines: list[str] = []
    settings = effective(RunConfig(data=DataConfig(image=ImageConfig(max_tokens=80))))
    write_learned(empty, folder, Provenance(base=files, base_name="b", config=settings), steps, lines.append)
    return lines


def step(folder: Path) -> str:
    return read_header(folder / "adapter" / WEIGHTS)[1]["moetune.step"]


@pytest.mark.filterwarnings("ignore")
def test_a_newer_adapter_replaces_only_the_earlier_one(tmp_path: Path) -> None:
    config = AdaptersConfig(attention=DENSE.attention)
    learned(config, tmp_path, range(3))
    (tmp_path / "adapter" / "mine.txt").write_text("precious")
    learned(config, tmp_path, range(3, 5))
    assert step(tmp_path) == "5"
    assert (tmp_path / "adapter" / "mine.txt").read_text() == "precious"
    assert learned(config, tmp_path, range(7, 7)) == [f"adapter: {tmp_path / 'adapter'}, written by an earlier start"]
    (tmp_path / "adapter" / REPLACED).write_text("")  # a resumed start was killed while it wrote a newer one
    learned(config, tmp_path, range(7, 7))
    assert step(tmp_path) == "7"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_model_trained_in_full_has_the_image_limits_of_training(tmp_path: Path) -> None:
    full = DensePartConfig(mode="full")
    learned(AdaptersConfig(attention=full, merger=full), tmp_path, range(3))
    assert '"longest_edge": 81920' in (tmp_path / "model" / "preprocessor_config.json").read_text()
    assert (
        (tmp_path / "model" / "README.md")
        .read_text()
        .startswith("# b, fine-tuned\n\nTrained in full by moetune.\n\n## ")
    )
