"""What is written down before a GPU measures it is what the planner says, so that it only changes knowingly."""

import json

from benchmarks.planner import predictions
from finetune.settings.checks import base_family, cross_check
from finetune.settings.recipes import load_recipe


def test_the_file_says_what_the_planner_says_today() -> None:
    """`python -m benchmarks.planner.predictions` renews it, in the commit that changes the planner."""
    written = json.loads(predictions.PATH.read_text())
    assert len({one["name"] for one in written}) == len(written) == 10
    assert written == list(
        one | {"commit": written[at]["commit"]} for at, one in enumerate(predictions.predictions(at=""))
    )


def test_every_prediction_is_of_a_run_that_can_be_started() -> None:
    for one in json.loads(predictions.PATH.read_text()):
        recipe, *words = one["words"]
        config, problems = load_recipe(recipe, words)
        problems += cross_check(config, ranks=one["gpus"], known=[])
        assert not [problem for problem in problems if problem.level == "error"], one["name"]
        assert one["layers"] <= base_family(config).text.num_hidden_layers
        assert one["tokens_per_second"] > 0
        assert one["peak_bytes"] > 0
