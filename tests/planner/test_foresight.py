"""Tests of plan.json, which a run writes, and of the warning when the run differs from its plan."""

import json
from pathlib import Path

import pytest

from benchmarks.planner.plan_case import Case, packed_row, write_base
from data.render.vision import read_spec
from finetune.files.hubconfig import read_family
from finetune.planner.foresight import LOOKED_AT, Foresight


def _foresight(folder: Path, case: Case, lines: list[str]) -> Foresight:
    base = write_base(folder / "base", experts=None)
    dense = ("parallel.ep=1", "adapters.experts.mode=frozen", "adapters.router.mode=frozen", "model.dtype=float32")
    config = Case(words=(*dense, "parallel.recompute=layer"), samples=(2048,), images=((1, 64, 64),)).config()
    foresight = Foresight(config, read_family(base), folder, say=lines.append)
    rows = [packed_row(case, read_family(base), read_spec(base))]
    for step in range(LOOKED_AT + 2):
        foresight.after(step, 0.5 + step, rows, sp=1)
    return foresight


def test_a_run_is_compared_with_a_plan_for_the_rows_it_has_seen(tmp_path: Path) -> None:
    """A recipe allows 1,024 visual tokens in 2,048, but its first rows may have none: then the peak is lower."""
    lines: list[str] = []
    foresight = _foresight(tmp_path, Case(words=(), samples=(300,), supervised=2), lines)
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["measured"]["step_seconds"] == 0.5 + LOOKED_AT
    weights = written["foreseen"]["weights_held"][0]
    foresight.weights(int(0.9 * weights))
    assert not lines
    foresight.peak(0, sp=1)
    written = json.loads((tmp_path / "plan.json").read_text())
    low, high = written["foreseen"]["peak_tensors_of_first_rows"]
    assert low == high < 0.8 * written["foreseen"]["peak_tensors"][0]
    assert "peak_tensors_of_first_rows is 0.000 GB" in lines.pop()
    foresight.peak(int(1.1 * high), sp=1)
    assert not lines


@pytest.mark.parametrize("share", [0.8, 1.2])
def test_a_difference_above_15_percent_is_a_warning(share: float, tmp_path: Path) -> None:
    lines: list[str] = []
    foresight = _foresight(tmp_path, Case(words=(), samples=(300,)), lines)
    weights = json.loads((tmp_path / "plan.json").read_text())["foreseen"]["weights_held"][0]
    foresight.weights(int(share * weights))
    (warning,) = lines
    assert warning.startswith(f"warning: weights_held is {int(share * weights) / 1e9:.3f} GB")
    assert "Do not size other runs by this plan" in warning
    assert json.loads((tmp_path / "plan.json").read_text())["measured"]["weights_held"] == int(share * weights)
