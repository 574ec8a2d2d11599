"""Makes what is served: bases of sizes that servers accept, short runs on them, merged folders and exports.

Every folder is made once; a proof that was interrupted goes on with what is there.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.cases import Case, Tuned, run_of
from benchmarks.serving.rows import write_rows

SIZES = (
    *("--hidden", "64", "--head-dim", "32", "--intermediate", "160"),
    *("--vision-hidden", "64", "--vision-heads", "2", "--vision-intermediate", "128", "--image-min-tokens", "4"),
)
"""vLLM's kernels for a CPU take hidden sizes that 32 divides, and heads of 32 or more."""
BASES = {
    "moe": ("--expert-hidden", "96"),
    "dense": ("--dense",),
    "thinking": ("--expert-hidden", "96", "--seed", "1"),
    "qwen3": ("--expert-hidden", "96", "--tokenizer", "qwen3"),  # llama.cpp knows tokenizers by what they do to a text
}
RECIPE = """\
model: {{path: {base}, dtype: float32}}
adapters:
  attention: {{mode: lora, r: 16, alpha: 32}}
parallel: {{ep: {ep}, recompute: none}}
data:
  packs_per_step: 4
  tokens_per_pack: 1024
  overlong: skip
  remainder: keep
  workers: 0
  sources: {{{sources}}}
optim: {{lr: 2.0e-2}}
schedule: {{steps: 16}}
checkpoint: {{every_steps: 0}}
run: {{name: {name}, folder: {runs}}}
"""
THINK = """\
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}"""


@dataclass(frozen=True, kw_only=True)
class Material:
    """A folder with everything that is served, made when it is first asked for."""

    folder: Path

    def rows(self) -> dict[str, Path]:
        """Return the file of rows of each kind."""
        return write_rows(self.folder / "rows")

    def base(self, name: str) -> Path:
        """Return a tiny base."""
        path = self.folder / "bases" / name
        if not (path / "config.json").is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            moetune("tiny", str(path), *SIZES, *BASES[name])
            if name == "thinking":
                _think(path)
        return path

    def learned(self, tuned: Tuned) -> Path:
        """Return what a run has written: an adapter, or without LoRA a complete model."""
        path = self.folder / "runs" / tuned.name / ("adapter" if tuned.lora else "model")
        if not path.is_dir():
            recipe = self.folder / f"{tuned.name}.yaml"
            sources = ", ".join(f"{kind.replace(' ', '-')}: {{path: {file}}}" for kind, file in self.rows().items())
            text = RECIPE.format(
                base=self.base(tuned.base), ep=tuned.ep, sources=sources, name=tuned.name, runs=self.folder / "runs"
            )
            recipe.write_text(text)
            moetune("train", str(recipe), "--ranks", str(tuned.ep), *tuned.overrides)
        return path

    def merged(self, tuned: Tuned) -> Path:
        """Return the merged folder of a run, or the complete model that it wrote."""
        if not tuned.lora:
            return self.learned(tuned)
        path = self.folder / "merged" / tuned.name
        if not path.is_dir():
            moetune("merge", str(self.base(tuned.base)), str(self.learned(tuned)), str(path))
        return path

    def without_thinking(self, tuned: Tuned) -> Path:
        """Return the merged folder of a run with the template of an instruct model."""
        path = self.folder / "merged" / f"{tuned.name}-plain"
        if not path.is_dir():
            shutil.copytree(self.merged(tuned), path)
            (path / "chat_template.jinja").unlink()
            shutil.copy(self.base("moe") / "chat_template.json", path)
        return path

    def exported(self, tuned: Tuned) -> Path:
        """Return the adapter of a run in the form that servers read."""
        path = self.folder / "exported" / tuned.name
        if not path.is_dir():
            moetune("export", str(self.learned(tuned)), str(path), "--format", "peft")
        return path

    def served(self, case: Case) -> tuple[Path, Path | None]:
        """Return the model folder of a case, and the adapter on it."""
        if case.form == "base":
            return self.base(case.base), None
        tuned = run_of(case.tuned)
        if case.form == "merged":
            return self.merged(tuned), None
        return self.base(case.base), self.learned(tuned) if case.form == "adapter" else self.exported(tuned)


def _think(base: Path) -> None:
    """Give a base the opening of a Thinking edition's template: the prompt itself begins the thinking."""
    template = json.loads((base / "chat_template.json").read_text())["chat_template"]
    begin = template.index("{%- if add_generation_prompt %}")
    (base / "chat_template.jinja").write_text(template[:begin] + THINK)
    (base / "chat_template.json").unlink()


def moetune(*words: str | Path, variables: Mapping[str, str] | None = None) -> str:
    """Run one of our commands as a user would, and return its standard output; raise with all of it if it fails."""
    ours = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    command: Sequence[str] = [sys.executable, "-m", "launchers.cli", *map(str, words)]
    done = subprocess.run(command, env=os.environ | (variables or {}) | ours, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr)[-3000:]
        raise RuntimeError(f"moetune {' '.join(map(str, words))} ended with {done.returncode}:\n{said}")
    return done.stdout
