"""Checks that the written predictions are those of the planner, so that they change only on purpose."""

import json

from benchmarks.planner import predictions
from finetune.settings.checks import base_family, cross_check
from finetune.settings.recipes import load_recipe


def test_the_file_holds_the_current_predictions_of_the_planner() -> None:
    """Renew the file with `python -m benchmarks.planner.predictions` in the commit that changes the planner."""
    written = json.loads(predictions.PATH.read_text())
    assert len({case["name"] for case in written}) == len(written) == 10
    commits = [{"commit": case["commit"]} for case in written]
    today = predictions.predictions(at="")
    assert written == [case | commit for case, commit in zip(today, commits, strict=True)]


def test_every_prediction_describes_a_run_that_can_start() -> None:
    for case in json.loads(predictions.PATH.read_text()):
        recipe, *words = case["words"]
        config, problems = load_recipe(recipe, words)
        problems += cross_check(config, ranks=case["gpus"], known=[])
        assert not [problem for problem in problems if problem.level == "error"], case["name"]
        assert case["layers"] <= base_family(config).text.num_hidden_layers
        assert case["tokens_per_second"] > 0
        assert case["peak_bytes"] > 0
