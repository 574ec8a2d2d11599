"""A run that reads its shards over http, as a user starts it."""

import shutil

import pytest
from starts import toy_run
from stores import FileServer, running
from user_runs import TRAIN, metrics, start

from data.prepare.build import BuildOptions, build_shards

FIGURES = ("step", "loss", "grad_norm", "tokens", "sources")


@pytest.mark.slow
def test_a_run_from_a_store_takes_the_steps_of_one_from_the_disk(tmp_path):
    place = toy_run(tmp_path, 48, images=True)
    build_shards(place / "rows.jsonl", place / "shards", BuildOptions(name="x", samples_per_shard=6))
    words = ["schedule.steps=4", "data.packs_per_step=2", "data.workers=2", "checkpoint.every_steps=2"]
    command = [*TRAIN, "--ranks", "2"]
    disk = start(place, command, "disk", *words, "data.sources.general.path=shards")
    assert disk.returncode == 0, disk.stderr[-3000:]
    with running(FileServer(place / "shards", lists=True)) as server:
        remote = [*words, f"data.sources.general.path={server.url}/", "data.cache_dir=cache"]
        store = start(place, command, "store", *remote)
        assert store.returncode == 0, store.stderr[-3000:]
        ours = metrics(place, "store")
        shutil.rmtree(place / "runs/store/checkpoints/step-000004")
        shutil.rmtree(place / "cache")
        again = start(place, [*TRAIN, "--ranks", "1"], "store", *remote, "parallel.ep=1")
        assert again.returncode == 0, again.stderr[-3000:]
    theirs = metrics(place, "disk")
    assert [{key: step[key] for key in FIGURES} for step in ours] == [
        {key: step[key] for key in FIGURES} for step in theirs
    ]
    samples = [step["sources"]["general"]["samples"] for step in theirs]
    assert [step["shard_hits"] + step["shard_waits"] for step in ours] == samples
    assert "shard_hits" not in theirs[0]
    last = metrics(place, "store")[-2:]
    assert [step["step"] for step in last] == [step["step"] for step in theirs[2:]]
    assert [step["sources"]["general"]["samples"] for step in last] == samples[2:]
    assert [step["loss"] for step in last] == pytest.approx([step["loss"] for step in theirs[2:]], rel=1e-4)
