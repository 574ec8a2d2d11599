"""Pictures for papers: one for each kind of record, with names that matplotlib would read as something else."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_runs import write_run

from finetune.report.files import read_run_files
from finetune.report.load import total_counts
from finetune.report.pictures import require_matplotlib, write_pictures
from launchers.cli import main


def test_every_kind_of_record_gets_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'moetune[report]'")
    folder = write_run(tmp_path / "mine", sources=("_hidden", "a$x^2$b"), steps=30)
    assert main(["report", str(folder), "--png"]) == 0
    names = ["loss", "grad_norm", "loss_balance", "tokens_per_second", "expert_load_max_over_mean", "loss_by_source"]
    names += ["evaluation_loss", "evaluation_accuracy", "evaluation_kl", "expert_load"]
    paths = [folder / "report.html", *(folder / "report" / f"{name}.png" for name in names)]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in paths]
    for path in paths[1:]:
        with Image.open(path) as image:
            assert image.size == (1280, 720)
            assert len(np.unique(np.asarray(image.convert("L")))) > 20
    first = (folder / "report" / "loss.png").read_bytes()
    write_pictures(read_run_files(folder), folder / "report")
    assert (folder / "report" / "loss.png").read_bytes() == first
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text("run: {name: begun}\n")
    assert write_pictures(read_run_files(begun), begun / "report") == []


def test_the_counts_of_all_records_are_drawn(tmp_path: Path) -> None:
    files = read_run_files(write_run(tmp_path / "mine"))
    assert np.array_equal(total_counts(files), np.sum([record["counts"] for record in files.loads], axis=0))


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.report.pictures.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"matplotlib, which is not installed: pip install 'moetune\[report\]'"):
        require_matplotlib()
