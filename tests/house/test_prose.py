"""Prose stays plain: no phrases of the old dialect, no long sentences, docstrings that begin with a verb or a noun."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from places import ROOT

PHRASES = (
    r"\b(?:is|are) wanted\b",
    r"\bMend\b",
    r"\bmend(?:ed|s)?\b",
    r"\bSo long a\b",
    r"\b[Ss]o (?:often|many times|long) (?:a|the|as)\b",
    r"\bFound are\b",
    r"\bfor ever\b",
    r"\bto one\. ",
    r"\bwithout a word\b",
    r"\bWho cannot\b",
    r"\banew\b",
    r"\bone does\b",
    r"\bwhole file\b",
    r"\bis no (?:folder|number|adapter|file|model|list|name|length)\b",
    r"\b(?:known|allowed) are\b",
    r"\bhanded over\b",
    r"\bnever came\b",
    r"\bwritten over\b",
    r"\bas (?:it lies|they lie)\b",
    r"\btokens? a second\b",
    r"\b(?:one|once|calls?|objects?|waits?) a (?:step|layer|token|rank|row|micro-batch|pass|forward|block|call)\b",
    r"\bin any case\b",
    r"\bto the bit\b",
    r"\bsettled what\b",
    r"\bFree room\b",
    r'"""(?:As|By|Of|So|That|What|Who) ',
    r"\bis (?:no|not) whole\b(?! number)",
    r"\b[Ss]ay it for people\b",
    r"\bthrough to the disk\b",
    r"\bsuch a one\b",
    r"\bwhat came of\b",
    r"\bheld against\b",
    r"\bas far as it shall\b",
    r"\b[Mm]ake so many\b",
    r"\bbeside (?:the peer|PEFT)\b",
    r"\bas ranks go\b",
    r"\bmust divide by\b",
    r"\bso nothing reads\b",
    r"\bread off the code\b",
    r"\bcomes? down over\b",
    r"\blets go of\b",
    r"\bbeside what\b",
    r"\bwhat (?:it|a rank|one rank|each rank) keeps\b",
)
"""Regular expressions that no source, page or message may match."""
ODD_OPENINGS = set(
    [
        "What",
        "Where",
        "When",
        "Which",
        "Whether",
        "How",
        "Of",
        "From",
        "In",
        "By",
        "If",
        "For",
        "On",
        "To",
        "As",
        "Not",
        "It",
        "Without",
        "So",
        "Who",
        "Found",
        "With",
    ]
)
"""Words that no docstring of a module, class or function may begin with."""
LONGEST = 30
"""Words that a sentence of README and docs may have."""
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
PACKAGES = ("benchmarks", "configs", "data", "finetune", "launchers", "moe", "tests")


def _tracked(*endings: str) -> list[Path]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [ROOT / name for name in names if name.endswith(endings)]


def test_no_page_or_source_uses_an_odd_phrase() -> None:
    odd = []
    for path in _tracked(".py", ".md", ".yaml", ".yml", ".toml"):
        if path == Path(__file__) or path.name == "CHANGELOG.md" or not path.is_file():
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            odd += [
                f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for phrase in PHRASES if re.search(phrase, line)
            ]
    assert odd == []


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    odd = []
    for path in _tracked(".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or "-"
                if text.split()[0] in ODD_OPENINGS:
                    odd.append(f"{path.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert odd == []


def _sentences(page: str) -> list[str]:
    """Return the sentences of a page, without code, comments, addresses and the rules of tables."""
    page = re.sub(r"```.*?```|<!--.*?-->|^---$.*?^---$", "\n\n", page, flags=re.DOTALL | re.MULTILINE)
    page = re.sub(r"\]\([^)]*\)", "]", page)
    page = re.sub(r"`(?:[^`\n]|\n(?!\n))*`", "code", page)
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", page):
        lines = block.splitlines()
        if any(line.lstrip().startswith("|") for line in lines):
            blocks += [cell for line in lines for cell in line.split("|")]
        else:
            blocks += re.split(r"\n(?=\s*(?:[-*>#]|\d+\.) )|\n(?=#)", block)
    return [
        sentence.strip()
        for block in blocks
        for sentence in re.split(r"(?<=[.!?])[)\"*]*\s+", " ".join(block.split()))
        if sentence.strip()
    ]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_sentence_of_a_page_is_long(path: Path) -> None:
    long = [
        sentence for sentence in _sentences(path.read_text()) if len(re.findall(r"[\w'’./%-]+", sentence)) > LONGEST
    ]
    assert long == []


def test_a_long_sentence_is_noticed() -> None:
    words = " ".join(["word"] * (LONGEST + 1))
    assert [len(sentence.split()) for sentence in _sentences(f"# Title\n\nShort one. {words}.\n\n| a | {words} |")] == [
        2,
        2,
        LONGEST + 1,
        1,
        LONGEST + 1,
    ]
