"""Typical mistakes: each ends `moetune train` with code 2 and one short message, before any rank starts."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from starts import environment, toy_run

from data.prepare.folder_lock import read_holder
from finetune.checkpoint.manifest import MANIFEST, Manifest, write_manifest
from finetune.checkpoint.run_lock import LOCK, take_run_for_ranks
from finetune.files.basefiles import open_base
from finetune.files.fingerprint import fingerprint
from finetune.files.tiny import TinyModel, write_tiny
from finetune.settings.recipes import effective, load_recipe
from launchers.cli import main

LINES = 6
"""The most lines of a message."""
RECIPE = ["tiny-cpu", "model.path=base", "data.sources.general.path=rows.jsonl", "parallel.ep=1"]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_run(tmp_path_factory.mktemp("toys"), rows=40, images=True)


@pytest.fixture
def place(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own with that base and those rows; ranks that start would leave their folder in it."""
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.glob("runs/*/logs")), "a rank has started"


def save(*words: str) -> Path:
    """Leave a checkpoint as a run of RECIPE would, for those who only read its manifest."""
    config, problems = load_recipe(RECIPE[0], [*RECIPE[1:], *words])
    assert not problems
    base = open_base(Path("base"))
    checkpoint = config.run.path / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    manifest = Manifest(
        step=2,
        ranks=1,
        ep=1,
        base="base",
        base_fingerprint=fingerprint(base),
        trained={},
        random=("cpu",),
        files={},
        state={},
        config=effective(config),
        config_hash="",
    )
    write_manifest(checkpoint, manifest)
    assert (checkpoint / MANIFEST).is_file()
    return checkpoint


def nothing() -> None:
    """Prepare nothing."""


def one_tag_too_many() -> None:
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["messages"][0]["content"] += "<image>"
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def another_base() -> None:
    save()
    write_tiny(Path("other"), TinyModel(seed=1))


def another_start() -> None:
    """This process, which lives, holds the run's folder."""
    take_run_for_ranks(Path("runs/tiny-cpu"), run_id="first", stall_seconds=60, say=print)


@dataclass(frozen=True, kw_only=True)
class Mistake:
    words: tuple[str, ...]
    cause: str
    cure: str
    prepare: Callable[[], object] = nothing


MISTAKES = {
    "wrong path": Mistake(
        words=("data.sources.general.path=row.jsonl",),
        cause="data.sources.general.path = 'row.jsonl': there is no such file or folder in /",
        cure="Name a folder of shards, a .tar, a pattern, or rows (docs/data-format.md lists their forms).",
    ),
    "typo in a key": Mistake(
        words=("optim.lrr=1e-4",),
        cause="optim.lrr = 0.0001 (command line): no such key.",
        cure="Did you mean `optim.lr`",
    ),
    "missing base": Mistake(
        words=("model.path=bases",),
        cause="model.path = 'bases': there is no such file or folder in /",
        cure="Name the folder of a Qwen3-VL base, or a hub id (owner/name).",
    ),
    "wrong image tag count": Mistake(
        prepare=one_tag_too_many,
        words=(),
        cause="no sample can be used: row 1: images has 1 item, but the messages contain 2 <image> marks",
        cure="Fix the rows; `moetune shards build` lists every row that it refuses",
    ),
    "no packs": Mistake(
        words=("data.packs_per_step=64",),
        cause="data.packs_per_step = 64: all sources together have 40 samples, so an epoch has no step",
        cure="Lower data.packs_per_step or data.tokens_per_pack, add data, or set data.remainder=keep",
    ),
    "resume with another base": Mistake(
        prepare=another_base,
        words=("model.path=other",),
        cause="model.path = 'other': runs/tiny-cpu/checkpoints/step-000002 was trained on another base, base",
        cure="Set model.path to the same weights, or start again with another run.name",
    ),
    "two starts": Mistake(
        prepare=another_start,
        words=(),
        cause=f"runs/tiny-cpu is in use by process {os.getpid()} on ",
        cure="Wait for it to end, or set another run.name",
    ),
    "resume with other values": Mistake(
        prepare=save,
        words=("optim.lr=0.5", "schedule.shape=constant"),
        cause="optim.lr: 0.001 in the checkpoint, 0.5 now; schedule.shape: 'cosine' in the checkpoint, 'constant' now",
        cure="Restore these values to continue it, or start again with another run.name",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_message(mistake: Mistake, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mistake.prepare()
    capsys.readouterr()
    assert main(["train", *RECIPE, *mistake.words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moetune train: 1 problem that keeps the run from starting:\n")
    assert mistake.cause in err
    assert mistake.cure in err
    assert len(err.splitlines()) <= LINES


def test_all_mistakes_come_at_once_and_the_command_loads_no_torch(place: Path) -> None:
    words = ["model.path=bases", "data.sources.general.path=row.jsonl", "optim.lrr=1", "data.workers=-1"]
    program = (
        "import sys; from launchers.cli import main; code = main(sys.argv[1:]);"
        "sys.exit('torch was loaded' if 'torch' in sys.modules else code)"
    )
    command = [sys.executable, "-c", program, "train", *RECIPE, *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    first, *lines = done.stderr.splitlines()
    assert first == "moetune train: 4 problems that keep the run from starting:"
    keys = {line.split(" = ")[0].strip() for line in lines}
    assert keys == {"optim.lrr", "data.workers", "model.path", "data.sources.general.path"}


def test_a_lone_rank_0_ends_before_it_imports_torch_and_other_ranks_do_not_look(place: Path) -> None:
    (place / "torch.py").write_text("print('torch is imported'); raise SystemExit(7)\n")
    words = [*RECIPE, "data.sources.general.path=row.jsonl"]
    alone = environment() | {"PYTHONPATH": f"{place}{os.pathsep}{environment()['PYTHONPATH']}"}
    command = [sys.executable, "-m", "finetune.train", *words]
    for rank, code in (("0", 2), ("1", 7)):
        ours = alone | {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
        done = subprocess.run(command, env=ours, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert ("there is no such file" in done.stderr) == (rank == "0")
    launched = alone | {"MOETUNE_LOOKED": "3f2a", "TORCHELASTIC_RUN_ID": "3f2a"}
    done = subprocess.run(command, env=launched, capture_output=True, text=True)
    assert done.returncode == 7  # its launcher has looked


def test_a_good_run_passes_and_leaves_no_lock(place: Path) -> None:
    config, problems = load_recipe(RECIPE[0], RECIPE[1:])
    from finetune.preflight.start import require_start

    checkpoint = save()
    (line,) = require_start(config, problems, ranks=1)
    assert "the number of packs is not known yet" in line
    assert read_holder(checkpoint.parents[1] / LOCK) is None
