"""For notebooks: run a study or pretrain one encoder from Python, with the settings that YAML has.

Both start Snakemake in a separate process, as the command line does, and show its lines as they come. So a call can be
interrupted and made again: finished work is not repeated.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from aps.errors import UserError
from aps.files import expanded, write_bytes
from aps.findings import Findings
from aps.layout import stage_folder, study_folder
from aps.registry import DATASETS
from aps.settings.reading import load_study
from aps.text import shorten
from aps.workflow.start import command

if TYPE_CHECKING:
    from aps.inference.model import Model

EXPERIMENT, IMAGES = "aps", "images"  # `pretrain` gives these names to its experiment and to a folder of images


def run(study: str | os.PathLike | Mapping[str, Any], *targets: str, cores: int | None = None) -> list[dict[str, Any]]:
    """Run a study; what is finished is not computed again.

    Args:
        study: a YAML file, or a dictionary with the same content, which is written into the study's folder.
        targets: as on the command line: `pretrain`, `knn`, a result file; default: all.
        cores: how many of this machine to use; default: all.

    Returns:
        metrics.json of every finished run: experiment, seed, stage, metrics, settings ...

    Raises:
        UserError: settings are wrong, or a stage failed (its output is printed).

    Example:
        >>> import aps
        >>> for run in aps.run("config/config.yaml"):
        ...     print(run["experiment"], run["seed"], run["stage"], run["metrics"])
    """
    if isinstance(study, Mapping):
        try:
            plain = _plain(study)
        except RecursionError:
            raise UserError("study: a block holds itself; give a study's keys only") from None
        loaded = load_study([], plain)  # validated before anything is written
        file = study_folder(loaded) / "study.yaml"
        write_bytes(file, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).encode())
    else:
        file = _path(study, "study", "a YAML file or a dictionary")
    loaded = load_study([file])
    arguments = [*(targets or ["all"]), "--configfile", str(file), "--cores", str(cores or "all")]
    if (status := _stream(command(arguments))) != 0:
        raise UserError(
            f"study '{loaded.study}' did not finish (Snakemake ended with status {status}); its lines above say why"
        )
    return Findings(loaded, sources=True, gone=True).runs()


def pretrain(
    data: str | os.PathLike,
    name: str = "mine",
    seed: int = 0,
    results: str = "results",
    cores: int | None = None,
    labels: bool = True,
    shrink: int | None = None,
    **settings: Any,
) -> Model:
    """Pretrain an encoder on a dataset or a folder of images; what is finished is not computed again.

    Args:
        data: a dataset's name (`digits`, `cifar10` ...) or a folder of images, a folder a class. A name wins over a folder: write `./digits`.
        name: name of the study; its results lie in results/NAME.
        cores: how many of this machine to use; default: all.
        labels: if false, the folder may be any tree of images, and all of them are for training.
        shrink: use copies of the folder's images with this many pixels on the shorter side; None: the images as they are.
        settings: blocks of an experiment, as in YAML: `encoder={"arch": "tiny", "image_size": 64}`,
            `pretrain={"epochs": 100}` ...

    Returns:
        The encoder, loaded.

    Raises:
        UserError: settings are wrong, `labels` or `shrink` beside a dataset's name, or the training failed (its output is printed).
    """
    place = _path(data, "data", "a dataset's name or a folder of images")
    known = isinstance(data, str) and data in DATASETS.names()
    if known and place.is_dir():
        print(f"note: {data} is taken as the dataset of that name; for the folder write ./{data}", file=sys.stderr)
    if known and (shrink is not None or not labels):
        raise UserError(
            f"{data} is a dataset's name, and labels and shrink are for a folder: leave them out, or write ./{data}"
        )
    study: dict[str, Any] = {
        "study": name,
        "results": results,
        "defaults": {"dataset": str(data) if known else IMAGES, "seeds": [seed], "stages": ["pretrain"], **settings},
        "experiments": {EXPERIMENT: {}},
    }
    if not known:
        folder = str(expanded(place).resolve())
        study["datasets"] = {IMAGES: {"folder": folder, "labels": labels, "shrink": shrink}}
    run(study, "pretrain", cores=cores)
    from aps.inference.load import load

    model: Any = load(stage_folder(Path(results) / name, EXPERIMENT, seed, "pretrain"))
    return model


def _path(value: Any, name: str, allowed: str) -> Path:
    """A path of an argument `name`. Raises UserError where it is none."""
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{name} is {shorten(repr(value), 60, '...')}; give {allowed}")
    return Path(value)


def _plain(value: Any) -> Any:
    """`value` with types that YAML has: lists for tuples, text for paths, and Python's for those of NumPy and torch."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, str):
        return str.__str__(value)  # np.str_ is a str, np.float64 a float
    if isinstance(value, float):
        return float(value)
    if isinstance(value, os.PathLike):
        return str(value)
    if callable(to_list := getattr(value, "tolist", None)):  # numbers too
        inner = to_list()
        return inner if type(inner) is type(value) else _plain(inner)
    return value


def _stream(arguments: list[str]) -> int:
    """Run a command, show its lines as they come (in a notebook too), and return its exit status.

    An interrupt is passed on to the command, which may take time to end.
    """
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    assert process.stdout is not None
    while True:
        try:
            for line in process.stdout:
                sys.stdout.write(line)
            return process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGINT)
            print("stopping: the jobs save their state", file=sys.stderr)
