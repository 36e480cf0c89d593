"""MLflow's page in a browser: the answer to a question is read off the first screen."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gammas
import pytest
from mlflow_stores import free_port

from aps.layout import stage_folder, study_folder
from aps.settings.reading import load_study
from aps.tracking.browsing import how_to_browse
from aps.tracking.describing import PARENT
from aps.tracking.server import Server
from aps.tracking.state import read_state

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PICTURES = os.environ.get("APS_PICTURES")  # a folder to leave screenshots in
# MLflow 3.17 asks for the user where nobody logs in; Chromium calls a page that is laid out twice in a frame an error.
NOT_OURS = re.compile(r"ajax-api/2\.0/mlflow/users/current|ResizeObserver loop")
# The assistant would take a third of the page, as it does at somebody's first visit.
CLOSED = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1','true');localStorage.setItem('mlflow.assistant.panelOpen_v1','false');"


def test_the_printed_line_names_the_page_of_the_studys_runs(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = gammas.write_study(tmp_path)
    study = load_study([file])
    fragment = "#/experiments/{}/runs?workflowType=machine_learning&viewStateShareKey=aps-finetune"
    assert how_to_browse(study, "http://host:5000").endswith(
        "http://host:5000/#/experiments?workflowType=machine_learning"
    )
    assert how_to_browse(study, "none") == "off (tracking_uri: none)"
    gammas.finish(study)
    gammas.send(file, store)
    state = read_state(stage_folder(study_folder(study), "gamma0", 0, "knn") / "tracking.json")
    assert state is not None and state.experiment_id
    line = how_to_browse(study, store)
    assert (
        "server --backend-store-uri sqlite:///results/mlflow.db --port 5000 --artifacts-destination results/mlartifacts"
        in line
    )
    assert line.endswith(f"http://127.0.0.1:5000/{fragment.format(state.experiment_id)}")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """`python -m aps ui` of results that were moved after MLflow had them -> the address that it prints, the study."""
    folder = tmp_path_factory.mktemp("gammas")
    file = gammas.write_study(folder)
    gammas.finish(load_study([file]))
    gammas.send(file, f"sqlite:///{folder}/results/mlflow.db")
    (folder / "elsewhere").mkdir()
    (folder / "results").rename(folder / "elsewhere" / "results")
    file = gammas.write_study(folder / "elsewhere")
    command = [sys.executable, "-m", "aps", "ui", "--configfile", str(file), "--port", str(free_port())]
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line.startswith("open http://127.0.0.1:"), process.stderr.read()
    yield line.removeprefix("open ").strip(), file
    process.send_signal(2)
    assert process.wait(60) == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    selenium = pytest.importorskip("selenium")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for option in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1500,1000",
    ):
        options.add_argument(option)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": f"try {{ {CLOSED} }} catch (e) {{}}"})
    assert selenium
    yield driver
    driver.quit()


def visit(browser: Any, address: str, wanted: str, picture: str | None = None) -> str:
    """Opens a page and waits until it shows `wanted` and changes no more -> its text. Its console holds no error."""
    browser.get("about:blank")
    browser.get(address)
    text, deadline = "", time.monotonic() + 120
    while time.monotonic() < deadline:
        before, text = text, browser.find_element("tag name", "body").text
        if wanted in text and before == text:
            break
        time.sleep(1.5)
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert wanted in text, text
    assert not [message for message in errors if not NOT_OURS.search(message)]
    if PICTURES and picture:
        browser.save_screenshot(str(Path(PICTURES) / picture))
    return str(text)


def target(browser: Any, words: str) -> str:
    """Where a link of the page goes."""
    return str(browser.find_element("link text", words).get_attribute("href"))


def table(browser: Any) -> dict[str, dict[str, str]]:
    """Rows of the table of runs in their order, by name: the cells by the names of their columns."""
    script = """
      const cells = {};
      for (const row of document.querySelectorAll('.ag-row')) {
        const at = row.getAttribute('row-index');
        cells[at] = cells[at] || {};
        for (const cell of row.querySelectorAll('.ag-cell'))
          cells[at][cell.getAttribute('col-id')] = cell.innerText.replaceAll('\\n', ' ');
      }
      return cells;
    """
    rows = browser.execute_script(script)
    ordered = [rows[at] for at in sorted(rows, key=int)]
    return {row["attributes.`Run Name`"]: row for row in ordered}


@pytest.mark.slow
def test_which_gamma_is_best_on_knn_over_three_seeds_and_at_what_cost_is_the_first_screen(
    page: tuple[str, Path], browser: Any
) -> None:
    address = page[0].replace("aps-finetune", "aps-knn")
    visit(browser, address, "gamma3/seed0/knn", "mlflow-best.png")
    found = table(browser)
    groups = {name: row for name, row in found.items() if "Group: " in name}
    assert [re.search(r"gamma\d", name)[0] for name in groups] == ["gamma3", "gamma0", "gamma9"]  # type: ignore[index]
    for (name, row), gamma in zip(groups.items(), (3.0, 0.0, 9.0), strict=True):
        cells = {key: value for key, value in row.items()}
        seeds = [gammas.figures(gamma, seed) for seed in gammas.SEEDS]
        shown = {  # a mean is followed by "(average)" where there is room
            key: cells[next(k for k in cells if key in k)].split()[0]
            for key in ("knn/top1_k20", "cost/seconds", "sampling.gamma")
        }
        assert float(shown["knn/top1_k20"]) == pytest.approx(statistics.mean(s["knn"] for s in seeds)), name
        assert float(shown["cost/seconds"]) == pytest.approx(statistics.mean(s["seconds"] for s in seeds) + 3, abs=0.1)
        assert float(shown["sampling.gamma"]) == gamma


@pytest.mark.slow
def test_the_page_draws_scores_costs_and_curves_and_no_epoch(page: tuple[str, Path], browser: Any) -> None:
    address = page[0].replace("aps-finetune", "aps-knn")
    text = visit(browser, f"{address}&compareRunsMode=CHART", "knn/top1_k20", "mlflow-charts.png")
    assert text.index("knn/top1_k20") < text.index("cost/seconds vs. knn/top1_k20") and "Parallel Coordinates" in text
    address = page[0].replace("aps-finetune", "aps-pretrain")
    text = visit(browser, f"{address}&compareRunsMode=CHART", "pretrain/positive_cosine", "mlflow-curves.png")
    assert text.index("pretrain/loss") < text.index("pretrain/positive_cosine") and "\nepoch\n" not in text
    browser.find_element("css selector", "button[aria-label='Configure charts']").click()
    time.sleep(2)
    menu = browser.find_element("css selector", "[role=menu]")
    metric = next(item for item in menu.find_elements("css selector", "[role=menuitem]") if item.text == "Metric")
    metric.click()
    time.sleep(2)
    assert "epoch" in [item.text for item in browser.find_elements("css selector", "[role=menu] [role^=menuitem]")]


@pytest.mark.slow
def test_a_runs_page_says_what_made_it_and_links_both_ways(page: tuple[str, Path], browser: Any) -> None:
    base, study = page[0].partition("/#")[0], load_study([page[1]])
    states = {
        stage: read_state(stage_folder(study_folder(study), "gamma3", 0, stage) / "tracking.json")
        for stage in ("pretrain", "knn")
    }
    experiment, ids = states["knn"].experiment_id, {stage: state.run_id for stage, state in states.items()}  # type: ignore[union-attr]
    run = f"{base}/#/experiments/{experiment}/runs/{ids['knn']}?workflowType=machine_learning"
    text = visit(browser, run, "sampling.gamma", "mlflow-run.png")
    for said in (
        "How sharply overlap is avoided.",
        "Its encoder: gamma3/seed0/pretrain",
        "Parent run",
        "digits (",
        "0123456",
    ):
        assert said in text, said
    assert "mlflow.aps" not in text and "digest" not in text
    text = visit(browser, target(browser, "gamma3/seed0/pretrain"), "What was made of its encoder")
    text = visit(browser, target(browser, "What was made of its encoder"), "gamma3/seed0/knn")
    assert "gamma3/seed0/finetune" in text and "gamma0/seed0/knn" not in text and "2 matching runs" in text
    store = f"sqlite:///{study.results}/mlflow.db"
    assert Server(store).client.get_run(ids["knn"]).data.tags[PARENT] == ids["pretrain"]


@pytest.mark.slow
def test_figures_are_shown_though_the_results_were_moved(page: tuple[str, Path], browser: Any) -> None:
    base, study = page[0].partition("/#")[0], load_study([page[1]])
    state = read_state(stage_folder(study_folder(study), "gamma3", 0, "pretrain") / "tracking.json")
    assert state is not None
    where = f"{base}/#/experiments/{state.experiment_id}/runs/{state.run_id}/artifacts/figures/views.png"
    visit(browser, where, "views.png")
    time.sleep(3)
    sizes = browser.execute_script(
        "return [...document.images].map(image => [image.naturalWidth, image.naturalHeight])"
    )
    drawn = browser.execute_script("return document.querySelectorAll('.js-plotly-plot image, canvas, img').length")
    assert [64, 32] in sizes or drawn, sizes
    from mlflow.artifacts import download_artifacts

    got = download_artifacts(run_id=str(state.run_id), artifact_path="figures/views.png", tracking_uri=base)
    assert Path(got).read_bytes()[:4] == b"\x89PNG"
