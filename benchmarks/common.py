"""What all benchmarks share: timing two things in turn, describing the machine, writing a JSON file and a plot.

Design: a benchmark's result is a ratio of two times that were taken side by side in one run. What slows the machine
slows both, so the ratio is reliable where a time alone is not. Each repetition gives one ratio; the median and the
quartiles are reported.

It does not know what is timed. Run benchmarks from the repository's root: python -m benchmarks.views
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from pydantic import BaseModel, ValidationError

from aps.errors import UserError
from aps.files import atomic_path
from aps.runtime.ranks import first_to_tell
from aps.settings.sentences import sentence
from benchmarks.options import folder

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn", "aps-vit")
MOST = 1_000_000  # of whatever is counted by an option
OURS, OTHER = "#1f6f8b", "#9aa5ab"  # colours of every plot


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark. description: a docstring, of which the first line is shown."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs; the figures mean nothing")
    parser.add_argument("--out", type=folder, default=RESULTS, help="folder of the JSON file and the plot")
    return parser


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a benchmark's `main` and exit: with its status, or 2 and one sentence for a mistake that the user can mend."""
    try:
        sys.exit(main())
    except UserError as error:
        mistake = str(error)
    except ValidationError as error:  # of an option that becomes a setting, such as --arch
        mistake = sentence("options", "", error, BaseModel)
    if first_to_tell():
        print(f"error: {mistake}", file=sys.stderr, flush=True)
    sys.exit(2)


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call in seconds, with the GPU's work if there is one."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def timed(*command: str, folder: str | Path = ".") -> dict[str, float]:
    """CPU and wall seconds of a command, and the number of lines it prints. It must succeed."""
    # Where Slurm's tools are installed and no controller answers, Snakemake's plugin waits ten seconds for it.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SLURM_CONF": os.devnull}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu, "wall": wall, "lines": done.stdout.count("\n")}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(ours: Callable[[], Any], ordinary: Callable[[], Any], repeats: int = 7, warmup: int = 2) -> dict[str, Any]:
    """Time both in turn, `repeats` times, after `warmup` calls of each that do not count.

    Returns the seconds of each, summaries, and `ratio`, ordinary / ours: above 1, ours is faster.
    """
    for _ in range(warmup):
        ours()
        ordinary()
    times: dict[str, list[float]] = {"ours": [], "ordinary": []}
    for repeat in range(repeats):
        # the order alternates, so that neither always finds the caches that the other left
        for name, function in [("ours", ours), ("ordinary", ordinary)][:: 1 if repeat % 2 == 0 else -1]:
            times[name].append(seconds(function))
    ratios = [b / a for a, b in zip(times["ours"], times["ordinary"], strict=True)]
    return {
        "ratio": spread(ratios),
        "ours": spread(times["ours"]),
        "ordinary": spread(times["ordinary"]),
        "seconds": times,
        "repeats": repeats,
    }


def row(what: str, ratio: dict[str, float], unit: str = "x", target: float | None = None) -> dict[str, Any]:
    """A row of the table that `python -m benchmarks` prints: what is compared, the spread of its ratio, the target."""
    return {"what": what, "ratio": ratio, "unit": unit, "target": target}


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles, minimum and maximum."""
    if len(values) == 1:
        low = middle = high = values[0]
    else:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high, "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    cpu = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    info: dict[str, Any] = {
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            info[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        info["gpu_memory_gib"] = round(memory / 2**30, 1)
        info["cuda"] = torch.version.cuda
        info["cudnn"] = torch.backends.cudnn.version()
    return info


def label(info: dict[str, Any] | None = None) -> str:
    """The machine in a few words, for titles and file names: the GPU's name, or the number of CPU cores."""
    info = info or machine()
    threads = info["torch_threads"]
    return info.get("gpu") or f"{info['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def write(name: str, result: dict[str, Any], settings: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Print a benchmark's rows, and write FOLDER/NAME-cpu.json or NAME-gpu.json with all that is needed to repeat it.

    result: a comparison has `rows` for the table (see `row`).

    Raises UserError where the file can't be written; the rows have been printed, and an earlier file stays.
    """
    for line in result.get("rows", ()):
        print("  " + table_line(line))
    path = _path(name, folder, "json")
    content = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "commit": _commit(),
        "machine": machine(),
        "settings": settings,
        **result,
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    print(f"  written: {path.name}")
    return path


def table_line(row: dict[str, Any]) -> str:
    """A row as text: what is compared, median and quartiles, target."""
    ratio, unit = row["ratio"], row["unit"]
    text = f"{row['what']:<66} {digits(ratio['median']):>7}{unit} ({digits(ratio['low'])} to {digits(ratio['high'])})"
    return text if row["target"] is None else f"{text}, target {row['target']:g}{unit}"


def _path(name: str, folder: Path, suffix: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}-{'gpu' if torch.cuda.is_available() else 'cpu'}.{suffix}"


def _command() -> str:
    """The command without --out, which does not change the result."""
    options = list(sys.argv[1:])
    if "--out" in options:
        del options[options.index("--out") : options.index("--out") + 2]
    return " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *options])


def _commit() -> str | None:
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, cwd=RESULTS.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def digits(value: float) -> str:
    """A figure with three digits, or as a whole number: 0.123, 12.3, 47,200."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plot(
    name: str, bars: dict[str, dict[str, float]], unit: str, title: str, ours: set[str], folder: Path = RESULTS
) -> Path:
    """Plot medians as bars with quartiles, beside the JSON file. bars: label -> spread. ours: labels in colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.4 * len(bars)), layout="constrained")
    labels = list(bars)
    values = [bars[key]["median"] for key in labels]
    errors = [
        [bars[k]["median"] - bars[k]["low"] for k in labels],
        [bars[k]["high"] - bars[k]["median"] for k in labels],
    ]
    axes.barh(labels, values, xerr=errors, color=[OURS if key in ours else OTHER for key in labels], height=0.6)
    for position, value in enumerate(values):
        axes.annotate(f"  {digits(value)}", (value + errors[1][position], position), va="center", fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(unit)
    figure.suptitle(f"{title}\n{label()}", fontsize=10, x=0.01, ha="left")
    axes.spines[["top", "right"]].set_visible(False)
    path = _path(name, folder, "png")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
    return path
