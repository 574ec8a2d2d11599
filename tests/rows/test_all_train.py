"""All 24 rows of the table in docs/data-format.md in one run: every source is read into steps of training."""

import json
import subprocess

import pytest
from limits import LIMIT_S
from row_sources import write_sources
from starts import environment
from user_runs import TRAIN

from finetune.files.tiny import write_tiny


@pytest.mark.slow  # a start of its own
def test_a_run_trains_on_every_kind_of_source(tmp_path):
    write_tiny(tmp_path / "base")
    sources = write_sources(tmp_path / "data")
    assert {name.partition("-")[0] for name in sources} == {f"{number:02d}" for number in range(1, 25)}
    sources["general"] = sources.pop("01")  # the recipe's own source
    recipe = {
        "base": "tiny-cpu",
        "parallel": {"ep": 1},
        "run": {"name": "all"},
        "model": {"path": "base", "dtype": "float32"},
        "data": {"sources": sources, "packs_per_step": 4, "tokens_per_pack": 1024, "remainder": "keep", "workers": 0},
        "schedule": {"epochs": 1},
    }
    (tmp_path / "all.yaml").write_text(json.dumps(recipe))
    words = [*TRAIN, "all.yaml"]
    done = subprocess.run(
        words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    steps = [json.loads(line) for line in (tmp_path / "runs/all/metrics.jsonl").read_text().splitlines()]
    assert steps
    assert all(step["grad_norm"] > 0 for step in steps)
