"""The fused kernels of quantised weights, without a GPU: their values in Triton's interpreter, and their code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from limits import LIMIT_S
from oracle import FOLDER
from places import ROOT

SCRIPT = ROOT / "tests" / "harness" / "triton_session.py"
pytestmark = pytest.mark.slow


def ask(part: str, cache: Path, **environment: str) -> dict[str, list]:
    if not (FOLDER / "triton").is_dir():
        pytest.skip(f"no triton in {FOLDER}: run `make test-all`, which installs it there")
    paths = os.pathsep.join(map(str, (ROOT, FOLDER)))
    environment |= {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, SCRIPT, part]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_kernels_compute_the_bits_of_their_twins(tmp_path: Path) -> None:
    apart = ask("values", tmp_path, TRITON_INTERPRET="1")
    assert len(apart) == 20
    for case, (units, around) in apart.items():
        # the interpreter cuts a float32 off where a GPU rounds it to bfloat16
        assert units <= ("bfloat16" in case), case
        assert around == 0, f"{case}: written beside the matrix"


def test_the_kernels_compile_for_three_architectures(tmp_path: Path) -> None:
    kernels = ask("compiled", tmp_path)
    assert len(kernels) == 12
    for case, (registers, spilled, has_fused, rounds) in kernels.items():
        assert registers <= 128, f"{case} uses {registers} registers"
        assert spilled == 0, f"{case} spills {spilled} bytes"
        assert not has_fused, f"{case}: a fused multiply-add rounds once less than torch does"
        assert rounds == ("bf16" in case), f"{case}: bfloat16 must be rounded to the nearest"
