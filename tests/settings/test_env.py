"""Tests of `moetune env`, which prints the facts for an issue report and no secret."""

import json

import pytest

from finetune.ranks.versions import TESTED
from launchers.cli import main
from launchers.env import packages, variables


def test_the_report_has_the_facts_for_an_issue(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"].keys() >= TESTED.keys()
    assert {"moetune", "python", "gpus", "cpus", "memory", "shared_memory", "disk", "variables"} <= report.keys()
    assert report["variables"]["OMP_NUM_THREADS"] == "1"
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert f"  torch {report['packages']['torch']}\n" in text
    assert all(f"{name}:" in text for name in report)


def test_missing_and_untested_packages_are_marked() -> None:
    here = packages({"torch": "0.1", "peft": "0.21.2", "wandb": "1", "something": "2"})
    assert here == {
        "torch": f"0.1, outside the tested {TESTED['torch']}",
        "transformers": "not installed",
        "deepspeed": "not installed",
        "peft": "0.21.2",
        "wandb": "1",
    }


def test_secrets_are_never_shown() -> None:
    here = {
        "HF_TOKEN": "a",
        "HF_HOME": "/hf",
        "NCCL_DEBUG": "INFO",
        "WANDB_API_KEY": "b",
        "SLURM_JOB_PASSWORD": "c",
        "X": "d",
    }
    assert variables(here) == {
        "HF_HOME": "/hf",
        "HF_TOKEN": "(set, not shown)",
        "NCCL_DEBUG": "INFO",
        "SLURM_JOB_PASSWORD": "(set, not shown)",
    }
