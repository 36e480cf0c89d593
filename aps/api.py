"""From Python, in a notebook: a study or one encoder, with the settings that YAML has.

Both start Snakemake as the command line does, in a process of its own whose lines are shown as they come; so they can be
interrupted and called again, and find what is done.
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
from aps.findings import Findings
from aps.layout import stage_folder, study_folder
from aps.registry import DATASETS
from aps.settings.reading import load_study
from aps.workflow.start import command

if TYPE_CHECKING:
    from aps.inference.model import Model

EXPERIMENT, IMAGES = "aps", "images"  # of `pretrain`: its experiment, and a folder's name as a dataset


def run(study: str | os.PathLike | Mapping[str, Any], *targets: str, cores: int | None = None) -> list[dict[str, Any]]:
    """Run a study, or what is not yet done of it.

    Args:
        study: a YAML file, or the same as a dictionary, which is written into the study's folder.
        targets: as on the command line: `pretrain`, `knn`, a result file; default: all.
        cores: of this machine; default: all.

    Returns:
        metrics.json of every finished run: experiment, seed, stage, metrics, settings ...

    Raises:
        UserError: settings are wrong, or a stage failed; its lines are above.

    Example:
        >>> import aps
        >>> for run in aps.run("config/config.yaml"):
        ...     print(run["experiment"], run["seed"], run["stage"], run["metrics"])
    """
    if isinstance(study, Mapping):
        loaded = load_study([], dict(study))  # validated before anything is written
        file = study_folder(loaded) / "study.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(_plain(study), sort_keys=False, allow_unicode=True))
    else:
        file = Path(study)
    loaded = load_study([file])
    arguments = [*(targets or ["all"]), "--configfile", str(file), "--cores", str(cores or "all")]
    if (status := _stream(command(arguments))) != 0:
        raise UserError(
            f"study '{loaded.study}' did not finish (Snakemake ended with status {status}); its lines above say why"
        )
    return Findings(loaded).runs()


def pretrain(
    data: str | os.PathLike,
    name: str = "mine",
    seed: int = 0,
    results: str = "results",
    cores: int | None = None,
    labels: bool = True,
    **settings: Any,
) -> Model:
    """Pretrain an encoder on a dataset or a folder of images; what is finished is not computed again.

    Args:
        data: a dataset's name (`digits`, `cifar10` ...) or a folder of images, a folder a class.
        name: of the study; its results lie in results/NAME.
        labels: false: the folder is any tree of images, all of them for training.
        settings: blocks of an experiment, as in YAML: `encoder={"arch": "tiny", "image_size": 64}`,
            `pretrain={"epochs": 100}` ...

    Returns:
        The encoder, loaded.

    Raises:
        UserError: settings are wrong, or the training failed; its lines are above.
    """
    known = str(data) in DATASETS.names()
    study: dict[str, Any] = {
        "study": name,
        "results": results,
        "defaults": {"dataset": str(data) if known else IMAGES, "seeds": [seed], "stages": ["pretrain"], **settings},
        "experiments": {EXPERIMENT: {}},
    }
    if not known:
        study["datasets"] = {IMAGES: {"folder": str(Path(data).expanduser().resolve()), "labels": labels}}
    run(study, "pretrain", cores=cores)
    from aps.inference.load import load

    model: Any = load(stage_folder(Path(results) / name, EXPERIMENT, seed, "pretrain"))
    return model


def _plain(value: Any) -> Any:
    """What YAML can write: lists for tuples, text for paths."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, os.PathLike) else value


def _stream(arguments: list[str]) -> int:
    """Run a command and show its lines as they come, in a notebook too; an interrupt is passed on and waited for."""
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
