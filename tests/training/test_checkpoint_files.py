"""The folder of a run's checkpoints and their manifests: which are kept, where a run starts, errors."""

import hashlib
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from bases import base
from corpora import LIMITS, corpus_of, renderer, write_shards

from data.stream.plan import PlanSettings
from data.stream.stream import DataStream, StreamSettings
from finetune.adapters.provenance import Provenance, base_of
from finetune.checkpoint.folder import best_checkpoint, find_latest, point_and_prune, starting_point
from finetune.checkpoint.manifest import Manifest, Trained, known_form, read_manifest, write_manifest
from finetune.config import EvalConfig
from finetune.files.atomic import UNFINISHED
from finetune.files.basefiles import open_base
from finetune.files.fingerprint import fingerprint
from finetune.training.verdict import Judge


def _finished(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    (folder / name / "manifest.json").write_text("{}")
    return folder / name


def test_the_best_checkpoint_is_kept_with_the_newest(tmp_path: Path) -> None:
    for step in range(1, 7):
        point_and_prune(_finished(tmp_path, f"step-00000{step}"), 2, is_best=step in (1, 3))
    steps = [f"step-00000{step}" for step in (3, 5, 6)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["BEST", "LATEST", *steps]
    assert best_checkpoint(tmp_path) == tmp_path / "step-000003"
    assert find_latest(tmp_path) == tmp_path / "step-000006"


def test_the_checkpoint_just_written_is_kept_even_if_the_clock_is_wrong(tmp_path: Path) -> None:
    ahead = time.time() + 3600
    for step in (1, 2, 3):
        os.utime(_finished(tmp_path, f"step-00000{step}") / "manifest.json", (ahead, ahead))
    new = _finished(tmp_path, "step-000004")
    point_and_prune(new, 3)
    assert find_latest(tmp_path) == new
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-00000{step}" for step in (2, 3, 4)]
    (tmp_path / "LATEST").unlink()
    assert find_latest(tmp_path) == new
    again = _finished(tmp_path, "step-000001")  # a start from an earlier step: the later ones were abandoned
    point_and_prune(again, 2)
    point_and_prune(_finished(tmp_path, "step-000002"), 2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000001", "step-000002"]


def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    folder = _finished(tmp_path, "step-000001")
    (tmp_path / "LATEST").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"LATEST is damaged: it is not UTF-8, .* Remove it, or name the checkpoint"):
        find_latest(tmp_path)
    for text in ("", "../elsewhere", "step-000007"):
        (tmp_path / "LATEST").write_text(text)
        assert find_latest(tmp_path) == folder
    (folder / "manifest.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"manifest.json is not valid JSON: .* Resume from another checkpoint: checkpoint"
    ):
        read_manifest(folder)


UNKNOWN_FORM = r"manifest.json is not what moetune writes \(\w+Error: .*\). Resume from another"
ODD = {
    "step": "1",
    "files": {"a": {"bytes": 1}},
    "trained": {"w": {"shape": None, "updates": 1}},
    "random": "cpu",
    "config": [],
    "more": 1,
}


@pytest.mark.parametrize("key", [*ODD, "absent"])
def test_an_invalid_manifest_with_a_correct_digest_is_refused(key: str, tmp_path: Path) -> None:
    manifest = Manifest(
        step=1,
        ranks=1,
        ep=1,
        base="b",
        base_fingerprint="f",
        trained={"w": Trained(shape=(2,), updates=1)},
        random=("cpu",),
        files={},
        state={},
        config={},
        config_hash="h",
    )
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    content = json.loads((tmp_path / "manifest.json").read_text())
    del content["digest"]
    if key == "absent":
        del content["state"]
    else:
        content[key] = ODD[key]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps(content | {"digest": digest}))
    with pytest.raises(ValueError, match=UNKNOWN_FORM):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "odd",
    [None, {}, {"identity": []}, {"quarantine": 1}, {"quarantine": [[0]]}, {"quarantine": [[0, {"unit": 1}]]}],
)
def test_a_data_state_of_another_form_is_named_by_its_manifest(odd: dict | None, tmp_path: Path) -> None:
    plan = PlanSettings(seed=5, packs_per_step=5, tokens_per_pack=LIMITS.tokens, patches_per_pack=LIMITS.patches)
    corpus = corpus_of({"one": write_shards(tmp_path / "one")})
    stream = DataStream(corpus, renderer(), plan, StreamSettings(), data_rank=0, data_size=1)
    with pytest.raises(ValueError, match=UNKNOWN_FORM), known_form(tmp_path):
        stream.load_state_dict(stream.state_dict() | odd if odd else odd)


@pytest.mark.parametrize(
    "odd", [3, {"first": {}}, {"first": {}, "last": {}, "best": []}, {"first": 1, "last": {}, "best": {}, "stale": 0}]
)
def test_a_judge_s_state_of_another_form_is_named_by_its_manifest(odd: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=UNKNOWN_FORM), known_form(tmp_path):
        Judge(EvalConfig()).load_state_dict(odd)


def test_a_save_needs_no_file_of_the_base(tmp_path: Path) -> None:
    shutil.copytree(base(), tmp_path / "base")
    files = open_base(tmp_path / "base")
    known = fingerprint(files)
    shutil.rmtree(tmp_path / "base")
    assert base_of(replace(Provenance(base=files, base_name="b"), scores={"x": 1.0}).metadata()).fingerprint == known


def test_where_a_run_starts(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "absent") is None
    first = _finished(tmp_path, "step-000001")
    (_finished(tmp_path, "step-000009.partial") / UNFINISHED).write_text("")
    _finished(tmp_path, "step-mine.partial")
    (tmp_path / "step-linked.partial").symlink_to(tmp_path / "step-mine.partial")
    point_and_prune(first, 2)
    users = ["step-linked.partial", "step-mine.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-000001", *users]
    second = _finished(tmp_path, "step-000002")
    assert find_latest(tmp_path) == first, "LATEST decides"
    assert best_checkpoint(tmp_path) is None
    (tmp_path / "LATEST").write_text("step-000007\n")
    assert find_latest(tmp_path) == second, "LATEST names a missing checkpoint"
    second.rename(tmp_path / "step-000002.replaced")
    assert find_latest(tmp_path) == tmp_path / "step-000002.replaced", "moved aside, but never replaced"
    assert starting_point(tmp_path, "auto") == tmp_path / "step-000002.replaced"
    assert starting_point(tmp_path, "never") is None
    assert starting_point(tmp_path / "x", str(first)) == first
    assert starting_point(tmp_path / "x", str(tmp_path)) == tmp_path / "step-000002.replaced"
    with pytest.raises(ValueError, match=r"checkpoint.resume: newest is neither a checkpoint nor a folder of"):
        starting_point(tmp_path, "newest")
