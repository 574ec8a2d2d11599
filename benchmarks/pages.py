"""Write the generated parts of pages: `python -m benchmarks.pages` (`--check` only compares).

README's status box and feature table come from docs/status.yaml, its table of GPUs from the planner. llms.txt comes
from the tables of docs/index.md, and the tested versions in docs/serving.md from what `make serve-proof` recorded. The
tables of docs/probes.md and docs/cards.md come from what `python -m benchmarks.probes` and `cards` recorded.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from benchmarks.cards import record as cards
from benchmarks.probes import record as probes
from benchmarks.serving.record import Cell, read_cells
from finetune.planner.fit import fitting
from finetune.planner.gpus import cluster
from finetune.planner.time import Assumed
from finetune.settings.checks import base_family, require
from finetune.settings.recipes import load_recipe

ROOT = Path(__file__).parents[1]
COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of GPUs to try for the table, smallest first."""
FREE = ("ep", "sp", "resident", "recompute")
"""Options that the planner may choose for the table; the length of a row is given."""
PACKS = 64
"""Packs per step in the table, so that each number of GPUs divides them."""


def main(argv: Sequence[str]) -> int:
    """Write the pages, or with `--check` name those that are not current."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 3 if a page is not current")
    args = parser.parse_args(argv)
    stale = []
    for path, text in pages(ROOT).items():
        if path.read_text() == text:
            continue
        stale.append(path.name)
        if not args.check:
            path.write_text(text)
    print(f"{'not current' if args.check else 'written'}: {', '.join(stale) or 'nothing'}")
    return 3 if args.check and stale else 0


def pages(root: Path) -> dict[Path, str]:
    """Return the text that each page should have."""
    status = read_status(root)
    readme = (root / "README.md").read_text()
    for name, lines in (
        ("status", status_box(status["status"])),
        ("gpus", gpu_table(**status["gpus"])),
        ("features", feature_table(status["peers"], status["features"])),
    ):
        readme = filled(readme, name, lines)
    index = (root / "docs" / "index.md").read_text()
    recorded = {
        "serving": {"served": served_table(read_cells())},
        "probes": probe_blocks(probes.read_numbers()),
        "cards": card_blocks(cards.read_numbers()),
    }
    return {
        root / "README.md": readme,
        root / "llms.txt": llms_text(index),
        **{root / "docs" / f"{name}.md": _page(root, name, blocks) for name, blocks in recorded.items()},
    }


def _page(root: Path, name: str, blocks: dict[str, list[str]]) -> str:
    text = (root / "docs" / f"{name}.md").read_text()
    for block, lines in blocks.items():
        text = filled(text, block, lines, path=f"docs/{name}.md")
    return text


def probe_blocks(numbers: probes.Numbers) -> dict[str, list[str]]:
    """Return the tables of docs/probes.md."""
    titles = ["probe", "the model learns", "seeds", "with", "without", "difference"]
    return {
        "detections": _table(titles, probes.detection_rows(numbers)),
        "dead": _table(["seed", "closed", "named"], probes.dead_rows(numbers.dead)),
    }


def card_blocks(numbers: cards.Numbers) -> dict[str, list[str]]:
    """Return the tables of docs/cards.md."""
    after = [f"LoRA on {parts}" for parts in cards.PARTS]
    kinds = list(numbers.bases[0].scores) if numbers.bases else []
    return {
        "cards": _table(["task", "metric", "seeds", "base", *after], cards.card_rows(numbers.cards)),
        "gains": cards.gain_lines(numbers.cards),
        "kept": _table(["task", "base", *after], cards.kept_rows(numbers.cards)),
        "bases": _table(["base", "seeds", "dead experts", "busiest", *kinds], cards.base_rows(numbers.bases)),
    }


def read_status(root: Path) -> dict[str, Any]:
    """Return the content of docs/status.yaml."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(root / "docs" / "status.yaml")))


def filled(page: str, name: str, lines: Sequence[str], *, path: str = "README.md") -> str:
    """Return the page with these lines between the two comments of that name."""
    begin, end = f"<!-- {name}: python -m benchmarks.pages -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"{path} must contain the comments {begin!r} and {end!r}, in this order")
    block = "\n".join([begin, *lines, end])
    return pattern.sub(lambda match: block, page)


def status_box(status: dict[str, str]) -> list[str]:
    """Return the quoted list of what is proved, measured and only computed."""
    return [f"> - **{name[0].upper()}{name[1:]}:** {text}." for name, text in status.items()]


def feature_table(peers: dict[str, Any], features: Sequence[dict[str, Any]]) -> list[str]:
    """Return a row for each feature, with a column for each kit."""
    columns = ["moetune", *peers]
    titles = ["moetune", *(f"{name} {version}" for name, version in peers.items())]
    rows = [[row["row"], *(_word(row[column]) for column in columns)] for row in features]
    return _table(["", *titles], rows)


def gpu_table(kinds: Sequence[str], rows: Sequence[int], models: Sequence[str]) -> list[str]:
    """Return the smallest number of GPUs for each model, kind of GPU and length of a row."""
    titles = ["LoRA of", "GPU", *(f"{tokens // 1024}K rows" for tokens in rows)]
    return _table(
        titles, [[model, kind, *(_cell(model, kind, tokens) for tokens in rows)] for model in models for kind in kinds]
    )


def _cell(model: str, kind: str, tokens: int) -> str:
    overrides = [
        f"model.family={model}",
        f"data.tokens_per_pack={tokens}",
        f"data.packs_per_step={PACKS}",
        "parallel.ep=1",
    ]
    if "-a" not in model.removeprefix("qwen3-vl"):
        overrides += [
            "adapters.experts.mode=frozen",
            "adapters.mlp.mode=lora",
            "adapters.mlp.r=8",
            "adapters.mlp.alpha=16",
        ]
    config, problems = load_recipe("qwen3-vl-30b-a3b-lora", overrides)
    require(config, problems, ranks=1)
    base = base_family(config)
    for count in COUNTS:
        machines = cluster(kind, gpus=count, per_node=None, price=None)
        proposals = fitting(config, base, machines, assumed=Assumed(), free=FREE)
        if proposals:
            rate = proposals[0].plan.time.tokens_per_second
            return f"{count} ({rate / 1000:.1f}K tok/s each)"
    return f"more than {COUNTS[-1]}"


def served_table(cells: Sequence[Cell]) -> list[str]:
    """Return a row for each case, with a column for each server and its version; controls are left out."""
    servers = list(dict.fromkeys((cell.server, cell.version) for cell in cells))
    by_case: dict[str, dict[tuple[str, str], Cell]] = {}
    for cell in cells:
        if not cell.is_control:
            by_case.setdefault(cell.case, {})[cell.server, cell.version] = cell
    titles = ["served", *(" ".join(server) for server in servers)]
    rows = [[case, *(_served(found.get(server)) for server in servers)] for case, found in by_case.items()]
    return _table(titles, rows)


def _served(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return f"{cell.outcome}, {cell.tokens} tokens" if cell.tokens else f"{cell.outcome}: {cell.reason}"


def llms_text(index: str) -> str:
    """Return the list of pages for language models, from the tables of the index."""
    title, summary = index.split("\n\n")[:2]
    lines = [title, "", "> " + " ".join(summary.split()), ""]
    for line in index.splitlines():
        if line.startswith("## "):
            lines += [line, ""] if lines[-1] == "" else ["", line, ""]
        row = re.fullmatch(r"\| \[(.+?)\]\((.+?)\) \| (.+) \|", line)
        if row:
            lines.append(f"- [{row[1]}](docs/{row[2]}): {row[3]}")
    return "\n".join(lines) + "\n"


def _word(value: bool | str) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
