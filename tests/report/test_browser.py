"""The report in headless Chromium: it draws, it asks for nothing, it fits a phone, and hostile texts stay texts.

`.ci/run` installs the browser. Where there is none, these tests skip.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import HOSTILE, fail, write_run

from benchmarks.harness.browser import chromium
from finetune.report.page import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
WIDTHS = {"phone": 390, "desktop": 1280}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        try:
            launched = chromium(started)
        except ValueError as error:
            pytest.skip(str(error))
        yield launched
        launched.close()


def _reports(folder: Path) -> dict[str, Path]:
    """Write a report of every kind of run."""
    runs = {
        "short": write_run(folder / "short", steps=1, evaluates=False),
        "crashed": write_run(folder / "crashed", outcome=None),
        "resumed": write_run(folder / "resumed", outcome="preempted", log=["resumed: x, saved by 2 ranks; 9 to go"]),
        "staged": write_run(folder / "staged", config={"stages": {"first": {}, "grown": {"from_step": 6}}}),
        "dense": write_run(folder / "dense", experts=None),
        "long": write_run(folder / "long", steps=10_000, experts=64, layers=12, load_every=100),
        "hostile": write_run(
            folder / HOSTILE.replace("/", "|"), text=HOSTILE, sources=(HOSTILE, "__proto__", "constructor")
        ),
    }
    fail(runs["crashed"], "the disk is full")
    (folder / "begun").mkdir()
    (folder / "begun" / "config.yaml").write_text("run: {name: begun}\n")
    alone = {name: write_report([run]) for name, run in runs.items()}
    compared = {"compared": write_report([runs["short"], runs["dense"], runs["hostile"]], folder / "compared.html")}
    return alone | compared | {"begun": write_report([folder / "begun"])}


def test_every_kind_of_run_opens_without_an_error_or_a_request(browser: Any, tmp_path: Path) -> None:
    problems = []
    for name, path in _reports(tmp_path).items():
        for width in WIDTHS.values():
            page = browser.new_page(viewport={"width": width, "height": 900})
            seen: list[str] = []
            page.on("console", lambda message, seen=seen: seen.append(f"console: {message.text}"))
            page.on("pageerror", lambda error, seen=seen: seen.append(f"error: {error}"))
            page.on("request", lambda request, seen=seen: seen.append(f"request: {request.url[:60]}"))
            page.goto(path.as_uri())
            page.wait_for_selector("footer")
            asked = [line for line in seen if line != f"request: {path.as_uri()[:60]}" and "request: data:" not in line]
            problems += [f"{name} at {width}: {line}" for line in asked]
            wide = page.evaluate("document.documentElement.scrollWidth")
            problems += [f"{name} at {width}: {wide} pixels wide"] if wide > width else []
            assert page.evaluate("window.pwned") is None
            page.close()
    assert problems == []


def test_curves_and_the_heatmap_are_drawn_and_can_be_read(browser: Any, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": WIDTHS["desktop"], "height": 900})
    page.goto(write_report([write_run(tmp_path / "mine", steps=40)]).as_uri())
    assert page.locator(".uplot canvas").count() >= 12
    assert page.evaluate(
        "[...document.querySelectorAll('.uplot canvas')].every((one) => painted(one) > 50)".replace("painted", PAINTED)
    )
    loss = page.locator(".card", has=page.get_by_role("heading", name="Loss", exact=True))
    loss.locator(".u-over").hover(position={"x": 3, "y": 50})
    assert loss.locator(".at").inner_text() == "step 0"
    heat, slider = page.locator("canvas.heat"), page.get_by_label("time", exact=True)
    last = heat.evaluate(f"{PIXELS}")
    slider.fill("0")
    assert page.locator("output").inner_text() == "step 0"
    assert heat.evaluate(f"{PIXELS}") != last
    every = heat.evaluate(f"{PIXELS}")
    page.get_by_label("tokens", exact=True).select_option(label="kind: image")
    assert heat.evaluate(f"{PIXELS}") != every
    heat.hover(position={"x": 2, "y": 2})
    assert page.locator(".readout").inner_text() == "Layer 0, expert 0: no token."
    page.close()


PAINTED = (
    "((canvas) => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.filter((b) => b).length)"
)
PIXELS = "(canvas) => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.join()"


def test_hostile_texts_are_shown_as_texts(browser: Any, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": WIDTHS["desktop"], "height": 900})
    page.goto(_reports(tmp_path)["hostile"].as_uri())
    page.wait_for_selector("footer")
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert page.locator("mark").first.evaluate("(node) => node.textContent") == shown
    assert page.locator("td", has_text="constructor").count() > 0
    assert page.locator("main img").count() == 3  # one of each source
    assert page.locator("script").count() == 2
    page.close()


def test_the_chosen_run_of_several_is_shown(browser: Any, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, text=f"Answer of {name}.") for name in ("one", "other")]
    page = browser.new_page(viewport={"width": WIDTHS["desktop"], "height": 900}, color_scheme="dark")
    page.goto(write_report(runs, tmp_path / "both.html").as_uri())
    assert page.locator("mark").first.inner_text() == "Answer of one."
    page.get_by_label("run", exact=True).select_option(label="other")
    assert page.locator("mark").first.inner_text() == "Answer of other."
    keys = page.locator(".card", has=page.get_by_role("heading", name="Loss", exact=True)).locator(".key")
    assert [text.split()[0] for text in keys.all_inner_texts()] == ["one", "other"]
    page.close()
