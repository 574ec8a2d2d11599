"""README and docs stay true: every shell line runs or parses, every file in the tree exists."""

import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
from places import ROOT

from benchmarks.gpu.__main__ import main as measure
from finetune.ranks.signals import GUARDED, PREEMPTED
from finetune.settings.recipes import load_recipe, recipe_names
from launchers.cli import COMMANDS, EXIT_CODES, main, parse

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


OWN_RECIPES = ("mine.yaml", "my-recipe.yaml", "my-documents.yaml")
"""Names that pages give a recipe of the reader's own."""


def _shell_lines() -> list[tuple[str, str]]:
    lines = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            joined = block.replace("\\\n", " ")
            lines += [(page.name, line.strip()) for line in joined.splitlines() if line.strip()]
    return lines


def _examples() -> list[tuple[str, str]]:
    """Return the command lines of the examples in --help."""
    modules = [(name, import_module(f"launchers.{name.replace('-', '_')}")) for name in COMMANDS]
    texts = [(name, module.EXAMPLE.replace("\\\n", " ")) for name, module in modules]
    return [(name, line.strip()) for name, text in texts for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize(("page", "line"), [*_shell_lines(), *_examples()])
def test_shell_lines_hold(page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    for name in OWN_RECIPES:
        Path(name).write_text("base: qwen3-vl-30b-a3b-lora\n")
    words = shlex.split(line, comments=True)
    if words[0] == "moetune":
        words = words[1 : words.index(">") if ">" in words else None]
        args = parse(words)
        if words[0] in {"check", "plan"}:
            assert main(words) == 0, f"{page}: {line}"
        elif hasattr(args, "config") and (args.config in recipe_names() or args.config in OWN_RECIPES):
            assert load_recipe(args.config, args.overrides)[1] == [], f"{page}: {line}"
    elif words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "bash":
        assert words[1] == "benchmarks/gpu/run.sh"
        with pytest.raises(SystemExit, match="0"):
            measure([*words[2:], "--help"])
    else:
        known = {"cd", "docker", "enroot", "git", "pip", "python", "python3", "source", "srun", "torchrun"}
        assert words[0] in known, f"{page}: {line}"
        subprocess.run(["bash", "-n", "-c", line], check=True)


def test_the_tree_in_readme_names_what_is_there() -> None:
    (tree,) = re.findall(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.strip()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    present = {path.split("/")[0] for path in tracked if "/" in path and not path.startswith(".")}
    assert {name for name in named if "." not in name} == present


def test_files_that_docs_name_are_there() -> None:
    pattern = r"`((?:benchmarks|configs|data|docs|finetune|launchers|moe|tests)/[\w./-]*)`"
    named = {path for page in PAGES for path in re.findall(pattern, page.read_text())}
    assert "finetune/train.py" in named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def _error_rows() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "errors.md").read_text()
    return re.findall(r"^\| `(.+?)` \| `(moetune .+?)` \|", text, re.MULTILINE)


@pytest.mark.parametrize(("message", "command"), _error_rows())
def test_errors_in_docs_are_what_the_command_says(
    message: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    for name, block in re.findall(r"```yaml\n# (\S+)\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(block)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 2
    assert message in capsys.readouterr().err


def test_exit_codes_are_the_same_in_help_docs_and_code() -> None:
    table = re.findall(r"^\| (\d+) \| ", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert table == [str(code) for code in EXIT_CODES]
    assert {str(PREEMPTED), str(GUARDED)} < set(table)


def _recipes() -> list[tuple[str, str, str, str, str]]:
    pattern = r"```yaml\n# recipe: (\S+) \[(\d+) x (\S+)\]\n(.*?)```"
    blocks = [(page, re.findall(pattern, page.read_text(), re.DOTALL)) for page in PAGES]
    return [(page.name, *recipe) for page, recipes in blocks for recipe in recipes]


@pytest.mark.parametrize(("page", "name", "gpus", "gpu", "text"), _recipes())
def test_recipes_in_docs_fit_the_hardware_that_they_name(
    page: str, name: str, gpus: str, gpu: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    assert main(["plan", name, "--gpus", gpus, "--gpu", gpu]) == 0, f"{page}: {name}"


def test_every_recipe_in_docs_names_its_hardware() -> None:
    named = sum(page.read_text().count("```yaml\n# recipe:") for page in PAGES)
    assert named == len(_recipes()) > 0


def _fragments() -> list[tuple[str, str]]:
    """Return the YAML blocks without a file's name: parts of a recipe."""
    blocks = [(page.name, re.findall(r"```yaml\n(?!# )(.*?)```", page.read_text(), re.DOTALL)) for page in PAGES]
    return [(page, text) for page, texts in blocks for text in texts]


@pytest.mark.parametrize(("page", "text"), _fragments(), ids=lambda value: value.split("\n")[0])
def test_parts_of_recipes_in_docs_are_sound(
    page: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("part.yaml").write_text(f"base: qwen3-vl-30b-a3b-lora\n{text}")
    assert main(["check", "part.yaml", "--ranks", "8"]) == 0, f"{page}: {text}"
