"""The report in a browser: its first screen, on a telephone, in dark mode, printed; never an error in the console."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gammas
import pytest
from PIL import Image

from aps.report.page import write_report
from aps.settings.reading import load_study

pytestmark = pytest.mark.slow
PICTURES = os.environ.get("APS_PICTURES")  # a folder to leave screenshots in
SCREEN, TELEPHONE, PAPER = (1280, 900), (390, 844), (718, 1000)  # of A4 within its margins, at 96 pixels an inch
CONTRAST = 4.5  # of text, by WCAG 2 AA
SMALLEST = 6.5  # points of letters in figures
LEGIBLE = 8.0  # pixels that they are at least

# Every text that is seen, with its colours and its box.
TEXTS = """
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), e = walker.currentNode.parentElement, range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    const box = range.getBoundingClientRect(), style = getComputedStyle(e);
    if (!text || e.closest('svg') || !box.width) continue;
    let behind = e;
    while (behind && getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
    found.push({text, colour: style.color, size: parseFloat(style.fontSize), right: box.right, left: box.left,
                behind: getComputedStyle(behind || document.documentElement).backgroundColor});
  }
  return found;
"""
FIGURES = """
  return [...document.querySelectorAll('figure svg')].map(svg => {
    const box = svg.getBoundingClientRect();
    return {width: box.width, left: box.left, right: box.right, scale: box.width / svg.viewBox.baseVal.width,
            ink: getComputedStyle(svg.querySelector('[style*="fill: currentColor"]')).fill};
  });
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of three gammas and three seeds, with a setting that makes its runs long, and names that are long."""
    folder = tmp_path_factory.mktemp("report")
    file = gammas.write_study(folder)
    content = json.loads(file.read_text())
    content["experiments"]["a-name-as-long-as-a-name-of-an-experiment-can-well-be"] = {
        "inherits": "gamma0", "seeds": [0], "stages": ["finetune", "knn"], "encoder": {"weights": "random"}, "description": "the floor",
    }  # fmt: skip
    file.write_text(json.dumps(content))
    study = load_study([file])
    gammas.finish(study)
    write_report(study, folder / "report", "none", f"--configfile {file}")
    return folder / "report/report.html"


@pytest.fixture(autouse=True)
def quiet(browser: Any) -> Iterator[None]:
    yield
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    assert not errors


def visit(browser: Any, page: Path, window: tuple[int, int], dark: bool = False, media: str = "") -> None:
    mobile = {"width": window[0], "height": window[1], "deviceScaleFactor": 1, "mobile": window == TELEPHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", mobile)
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.get(page.as_uri())


def picture(browser: Any, name: str) -> Image.Image:
    """What the window shows; left in PICTURES too."""
    content = base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", {})["data"])
    if PICTURES:
        (Path(PICTURES) / name).write_bytes(content)
    return Image.open(io.BytesIO(content)).convert("RGB")


def rgb(text: str) -> tuple[float, ...]:
    return tuple(float(x) for x in re.findall(r"[\d.]+", text)[:3])


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Of two colours, by WCAG 2."""

    def luminance(colour: tuple[float, ...]) -> float:
        parts = [x / 255 / 12.92 if x <= 10.3 else ((x / 255 + 0.055) / 1.055) ** 2.4 for x in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def fits(browser: Any, width: int) -> None:
    """Nothing is wider than the page, so nothing is scrolled sideways or cut."""
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for text in browser.execute_script(TEXTS):
        assert text["left"] >= -1 and text["right"] <= width + 1, text
    for figure in browser.execute_script(FIGURES):
        assert figure["left"] >= -1 and figure["right"] <= width + 1, figure


def test_which_gamma_is_best_on_knn_and_at_what_cost_is_read_off_the_first_screen(browser: Any, page: Path) -> None:
    visit(browser, page, SCREEN)
    picture(browser, "report.png")
    script = "return [...document.querySelectorAll('h1, .question, .facts, table:first-of-type tr')].filter(e => e.getBoundingClientRect().bottom < innerHeight).map(e => e.innerText)"
    first = "\n".join(browser.execute_script(script))
    knn = statistics.mean(gammas.figures(3.0, seed)["knn"] for seed in gammas.SEEDS)
    seconds = statistics.mean(gammas.figures(3.0, seed)["seconds"] for seed in gammas.SEEDS) + 63
    assert gammas.QUESTION in first and "0123456789ab" in first and "two cores, 1 process" in first
    row = next(line for line in first.splitlines() if re.search(rf"{knn:.1f} ± \d\.\d ★", line))
    assert f"{seconds:,.0f}" in first[first.index(row) :].split("gamma9")[0]
    lines = [e.text for e in browser.find_elements("css selector", "li")]
    assert any(line.startswith(f"kNN top-1, k = 20: gamma3 is best: {knn:.1f}") for line in lines)


def test_a_score_leads_to_its_runs(browser: Any, page: Path) -> None:
    visit(browser, page, SCREEN)
    browser.find_element("css selector", "a[href='#run-gamma3-knn']").click()
    heading = browser.find_element("id", "run-gamma3-knn")
    top = browser.execute_script("return arguments[0].getBoundingClientRect().top", heading)
    assert -1 <= top < SCREEN[1] and heading.text == "gamma3, knn"
    runs = browser.execute_script(
        "return [...document.querySelectorAll('#run-gamma3-knn ~ .run')].slice(0, 3).map(e => e.innerText)"
    )
    for seed, text in enumerate(runs):
        assert f"Seed {seed}: kNN top-1, k = 20 {gammas.figures(3.0, seed)['knn']:.2f}" in text
        assert f"python -m aps knn --experiment gamma3 --seed {seed} --again --configfile" in text


def test_on_a_telephone_everything_fits_and_letters_are_legible(browser: Any, page: Path) -> None:
    visit(browser, page, TELEPHONE)
    picture(browser, "report-phone.png")
    fits(browser, TELEPHONE[0])
    assert min(text["size"] for text in browser.execute_script(TEXTS)) >= 10
    for figure in browser.execute_script(FIGURES):
        assert SMALLEST * figure["scale"] >= LEGIBLE, figure
    labels = browser.execute_script(
        "return [...document.querySelectorAll('td[data-label]')].map(e => getComputedStyle(e, '::before').content)"
    )
    assert any("kNN top-1" in label for label in labels), "a number without its column's name"


@pytest.mark.parametrize("window", [SCREEN, TELEPHONE])
@pytest.mark.parametrize("dark", [False, True])
def test_text_and_figures_are_told_from_what_is_behind_them(
    browser: Any, page: Path, window: tuple[int, int], dark: bool
) -> None:
    visit(browser, page, window, dark)
    shown = picture(browser, f"report-{'dark' if dark else 'light'}-{window[0]}.png")
    behind = browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(rgb(behind)) < 3 * 60) == dark and shown.getpixel((2, 2)) == rgb(behind)
    for text in browser.execute_script(TEXTS):
        assert contrast(rgb(text["colour"]), rgb(text["behind"])) >= CONTRAST, text
    for figure in browser.execute_script(FIGURES):
        assert contrast(rgb(figure["ink"]), rgb(behind)) >= CONTRAST, figure


def test_on_paper_nothing_is_cut_and_what_is_folded_is_open(browser: Any, page: Path) -> None:
    visit(browser, page, PAPER, dark=True, media="print")
    picture(browser, "report-print.png")
    fits(browser, PAPER[0])
    assert (
        browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    heights = browser.execute_script(
        "return [...document.querySelectorAll('details p')].map(e => e.getBoundingClientRect().height)"
    )
    assert heights and min(heights) > 10
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})
    content = base64.b64decode(printed["data"])
    assert content.startswith(b"%PDF")
    if PICTURES:
        (Path(PICTURES) / "report.pdf").write_bytes(content)
