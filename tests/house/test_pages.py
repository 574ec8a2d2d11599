"""README's generated blocks, llms.txt and the links of all pages are current."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from locked import PROJECT
from places import ROOT

from benchmarks import pages
from benchmarks.cards import record as cards
from benchmarks.probes import record as probes
from benchmarks.probes.cases import CASES
from benchmarks.serving.environments import LISTS
from benchmarks.serving.record import CONTROL, read_cells
from finetune.files.readers import TESTED

EXTRAS = PROJECT["project"]["optional-dependencies"]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "llms.txt")] + DOCS


def _block(name: str, page: str = "README.md") -> list[str]:
    text = (ROOT / page).read_text()
    (block,) = re.findall(
        f"<!-- {name}: python -m benchmarks.pages -->\n(.*?)\n<!-- end of {name} -->", text, re.DOTALL
    )
    return block.splitlines()


def test_readme_has_the_status_and_the_features_of_the_status_file() -> None:
    status = pages.read_status(ROOT)
    assert _block("status") == pages.status_box(status["status"])
    assert _block("features") == pages.feature_table(status["peers"], status["features"])


def test_readme_has_the_gpus_that_the_planner_finds_for_one_model() -> None:
    table = {**pages.read_status(ROOT)["gpus"], "models": ["qwen3-vl-30b-a3b"]}
    rows = pages.gpu_table(**table)
    assert len(rows) == 2 + len(table["kinds"])
    assert set(rows) <= set(_block("gpus"))


@pytest.mark.slow
def test_readme_has_the_gpus_that_the_planner_finds() -> None:
    assert _block("gpus") == pages.gpu_table(**pages.read_status(ROOT)["gpus"])


def test_the_page_of_serving_has_what_was_proved_on_live_servers() -> None:
    assert _block("served", "docs/serving.md") == pages.served_table(read_cells())


def test_every_recorded_comparison_is_as_expected_and_has_a_control() -> None:
    cells = read_cells()
    assert [cell for cell in cells if cell.outcome != cell.expected] == []
    compared = {(cell.server, cell.case) for cell in cells if not cell.is_control and cell.outcome != "refused"}
    controls = {(cell.server, cell.case.removeprefix(CONTROL)) for cell in cells if cell.is_control}
    assert compared == controls
    assert all(cell.outcome == "differs" for cell in cells if cell.is_control)


def test_an_export_names_the_releases_that_were_compared_with_training() -> None:
    cells = read_cells()
    assert {cell.version for cell in cells if cell.server == "vllm"} == {TESTED["vllm"]}
    assert {cell.version for cell in cells if cell.server == "transformers"} == {TESTED["transformers"]}
    assert f"peft=={TESTED['peft']}\n" in (LISTS / "transformers.txt").read_text()
    outcomes = {(cell.server, cell.case): cell.outcome for cell in cells}
    assert outcomes["vllm", "exported adapter on a dense base"] == "equal"
    assert outcomes["vllm", "exported adapter on experts"] == "refused"
    assert outcomes["transformers", "exported adapter on a dense base"] == "equal"
    assert outcomes["transformers", "exported adapter on experts"] == "equal"


@pytest.mark.parametrize("page", ["probes", "cards"])
def test_the_pages_of_probes_and_cards_have_what_was_recorded(page: str) -> None:
    recorded = {"probes": pages.probe_blocks(probes.read_numbers()), "cards": pages.card_blocks(cards.read_numbers())}
    for name, lines in recorded[page].items():
        assert _block(name, f"docs/{page}.md") == lines


def test_every_probe_detects_its_mechanism() -> None:
    numbers = probes.read_numbers()
    trained = [(one.probe, one.seed) for one in numbers.detections]
    assert sorted(trained) == sorted((case.probe, seed) for case in CASES for seed in (0, 1, 2))
    assert [one for one in numbers.detections if one.difference < probes.LEAST] == []
    assert [one.seed for one in numbers.dead if one.exactly] == [0, 1, 2]


def test_a_difference_that_is_missing_or_an_expert_too_many_counts_as_undetected() -> None:
    blind = replace(probes.read_numbers().detections[0], having=0.8, lacking=0.6)
    assert blind.difference < probes.LEAST
    closed = probes.read_numbers().dead[0]
    assert closed.exactly
    assert not replace(closed, named=[[*experts, 99] for experts in closed.named]).exactly
    assert not replace(closed, before=closed.named).exactly


def test_llms_txt_lists_the_pages_of_the_index() -> None:
    assert (ROOT / "llms.txt").read_text() == pages.llms_text((ROOT / "docs" / "index.md").read_text())


def test_every_page_is_in_the_index_and_in_the_menu_of_the_site() -> None:
    names = {path.name for path in DOCS}
    index = (ROOT / "docs" / "index.md").read_text()
    menu = (ROOT / "mkdocs.yml").read_text().split("nav:")[1]
    assert set(re.findall(r"\]\((\S+?\.md)\)", index)) == names - {"index.md"}
    assert set(re.findall(r"[\w-]+\.md", menu)) == names


def test_a_page_without_its_comments_is_refused() -> None:
    with pytest.raises(ValueError, match=r"README.md must contain the comments '<!-- gpus"):
        pages.filled("# A page", "gpus", [])


def _anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    named = set(re.findall(r'<a id="([^"]+)">', path.read_text()))
    return named | {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_pages_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        if not path.exists() or (anchor and anchor not in _anchors(path)):
            broken.append(target)
    assert broken == []


@pytest.mark.slow  # installs what CI does not need otherwise
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    python = tmp_path / "site-env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "site-env"], check=True)
    lock = ["-c", ROOT / "constraints.txt"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *lock, *EXTRAS["docs"]], check=True)
    built = [python, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(built, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "configuration" / "index.html").is_file()


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 1600
