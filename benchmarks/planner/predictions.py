"""The planner's predictions for ten runs on one GPU, recorded before any of them ran.

    python -m benchmarks.planner.predictions      renew benchmarks/results/predictions.json

On a GPU, the same runs are measured and compared. A run has the recipe's words, some of the model's layers, and full
rows of samples and images with the lengths in `assumed`. Loads no torch.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import ROOT, commit
from finetune.planner.gpus import cluster
from finetune.planner.plan import Plan, plan
from finetune.planner.time import Assumed
from finetune.settings.checks import base_family
from finetune.settings.recipes import load_recipe

RECIPE = "qwen3-vl-30b-a3b-lora"
PATH = ROOT / "benchmarks" / "results" / "predictions.json"
MICRO_BATCHES = 4
TEXT = Assumed(vision_share=0.0)
IMAGES = Assumed(image_tokens=260)
"""Half of the tokens are photographs of 640 x 427, like those in the kit."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run."""

    gpu: str
    layers: int
    tokens: int
    recompute: str
    assumed: Assumed

    @property
    def name(self) -> str:
        """A short, unique name."""
        seen = "images" if self.assumed.vision_share else "text"
        gpu = self.gpu.partition("-")[0]
        return f"{gpu}, {self.layers} layers, {self.tokens} tokens, recompute {self.recompute}, {seen}"

    @property
    def words(self) -> list[str]:
        """The recipe and its overrides, with everything on one GPU."""
        vision = int(self.tokens * self.assumed.vision_share) or 1
        return [
            RECIPE,
            "parallel.ep=1",
            "parallel.resident=frozen",
            f"parallel.recompute={self.recompute}",
            f"data.tokens_per_pack={self.tokens}",
            f"data.vision_tokens_per_pack={vision}",
            f"data.packs_per_step={MICRO_BATCHES}",
        ]


CASES = (
    Case(gpu="h200-141gb", layers=48, tokens=4096, recompute="layer", assumed=TEXT),
    Case(gpu="h200-141gb", layers=48, tokens=8192, recompute="layer", assumed=TEXT),
    Case(gpu="h200-141gb", layers=48, tokens=8192, recompute="selective", assumed=IMAGES),
    Case(gpu="h200-141gb", layers=48, tokens=4096, recompute="none", assumed=TEXT),
    Case(gpu="h200-141gb", layers=8, tokens=8192, recompute="layer", assumed=IMAGES),
    Case(gpu="h100-80gb", layers=48, tokens=4096, recompute="layer", assumed=TEXT),
    Case(gpu="h100-80gb", layers=8, tokens=4096, recompute="layer", assumed=TEXT),
    Case(gpu="h100-80gb", layers=8, tokens=8192, recompute="layer", assumed=IMAGES),
    Case(gpu="h100-80gb", layers=4, tokens=8192, recompute="selective", assumed=TEXT),
    Case(gpu="h100-80gb", layers=4, tokens=4096, recompute="none", assumed=TEXT),
)


def predicted(case: Case) -> Plan:
    """Return the plan of a run with the case's number of layers."""
    config, problems = load_recipe(case.words[0], case.words[1:])
    assert not problems, problems
    base = base_family(config)
    base = replace(base, text=replace(base.text, num_hidden_layers=case.layers))
    return plan(config, base, cluster(case.gpu, gpus=1, per_node=None, price=None), assumed=case.assumed)


def predictions(*, at: str) -> Iterator[dict[str, Any]]:
    """Yield the file's entry for each run; `at` is the commit. Peak bytes exclude the planner's reserve."""
    for case in CASES:
        foreseen = predicted(case)
        yield {
            "name": case.name,
            "gpu": case.gpu,
            "gpus": 1,
            "words": case.words,
            "layers": case.layers,
            "assumed": asdict(case.assumed),
            "tokens_per_second": round(foreseen.time.tokens_per_second, 1),
            "step_seconds": round(foreseen.time.step, 4),
            "host_seconds": round(foreseen.time.host, 4),
            "limit": foreseen.time.limit,
            "peak_bytes": foreseen.memory.peak,
            "commit": at,
        }


def write(path: Path) -> None:
    """Write all predictions to a file."""
    runs = list(predictions(at=commit(ROOT)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    write(PATH)
    for run in json.loads(PATH.read_text()):
        print(f"{run['name']:<58} {run['tokens_per_second']:>9,.0f} tokens/s {run['peak_bytes'] / 1e9:>7.2f} GB")
