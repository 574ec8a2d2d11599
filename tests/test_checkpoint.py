"""Checkpoints: resumed runs equal uninterrupted ones, at the same layout bit for bit; what is broken is refused."""

from pathlib import Path

import pytest
import torch
from base_folders import write_base
from checkpoint_session import AFTER, Job, session, whole_tensors
from ranks import run_ranks
from tiny_moe import vl_model

DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(vl_model(), tmp_path_factory.mktemp("base") / "base")


@pytest.mark.slow
def test_any_layout_continues_exactly(base: Path, tmp_path: Path) -> None:
    step = {(world, dtype): tmp_path / f"{world}-{dtype}" / "step-000002" for world in (2, 4) for dtype in DTYPES}
    wanted = {}
    for world in (2, 4):
        jobs = [Job(folder=step[world, dtype].parent, ep=2, dtype=dtype, save=True) for dtype in DTYPES]
        jobs += [Job(folder=tmp_path / "x", ep=2, dtype=dtype, resume=step[world, dtype]) for dtype in DTYPES]
        found = run_ranks(session, world, base, jobs)
        assert all(rank == found[0] for rank in found)
        assert found[0][:2] == found[0][2:], "the same layout, bit for bit"
        wanted |= {(world, dtype): run for dtype, run in zip(DTYPES, found[0], strict=False)}
    for world, ep in ((1, 1), (2, 1), (4, 4)):
        again = {key: tmp_path / f"{world}-{ep}-of-{key}" for key in wanted}
        jobs = [
            Job(folder=again[key], ep=ep, dtype=key[1], resume=step[key], save=True, resident=key[1] == "float32")
            for key in wanted
        ]
        for key, run in zip(wanted, run_ranks(session, world, base, jobs)[0], strict=True):
            print(world, ep, key, run, wanted[key])
            for what in ("losses", "norms"):
                assert len(run[what]) == AFTER
                assert run[what] == pytest.approx(wanted[key][what], rel=1e-5 if key[1] == "float32" else 1e-2)
            before, after = (whole_tensors(folder) for folder in (step[key], again[key] / "step-000002"))
            names = [name for name in before if not name.startswith("random/")]
            assert all(torch.equal(before[name], after[name]) for name in names), "not a bit of the state changed"
