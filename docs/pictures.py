"""Makes the pictures of the documentation from a finished demo: `make pictures`.

docs/images/dag.png       the rules and their inputs (graphviz)
docs/images/scores.png    the demo's scores, from its report
docs/images/report.png    the top of the demo's report in a browser (chromium)

If a program is missing, its pictures stay as they are, and its name is printed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).parent / "images"
REPORT = Path("results/demo/report")
WINDOW = (1280, 800)


def main() -> None:
    if not (REPORT / "report.html").exists():
        sys.exit(f"{REPORT}/report.html is missing; run make demo first")
    shutil.copy(REPORT / "figures/scores/scores.png", IMAGES / "scores.png")
    dot, browser = shutil.which("dot"), shutil.which("chromium") or shutil.which("google-chrome")
    if dot:
        rules = subprocess.run(
            [sys.executable, "-m", "snakemake", "--rulegraph", "dot"], capture_output=True, check=True
        ).stdout
        subprocess.run([dot, "-Tpng", "-Gdpi=80", "-o", IMAGES / "dag.png"], input=rules, check=True)
    else:
        print("dot (graphviz) is missing: dag.png stays", file=sys.stderr)
    if browser:
        photograph(browser, (REPORT / "report.html").resolve().as_uri(), IMAGES / "report.png")
    else:
        print("chromium is missing: report.png stays", file=sys.stderr)


def photograph(browser: str, address: str, picture: Path) -> None:
    """Save a page as a picture of a window of 1280 x 800 pixels, after it has loaded, in 256 colours."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}",
            f"--window-size={WINDOW[0]},{WINDOW[1]}", "--virtual-time-budget=20000", f"--screenshot={picture.resolve()}", address,
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    with Image.open(picture) as image:
        reduced = image.convert("RGB").quantize(256)
    reduced.save(picture, optimize=True)


if __name__ == "__main__":
    main()
