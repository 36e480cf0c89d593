"""Checks before the first job of a study that no job will fail for its inputs: `python -m aps check`.

`aps.settings.checks` checks settings alone, whenever a study is read. This checks them against the machine: sources
that do not exist, a results folder that is closed, batches larger than the dataset, resources, the address of the
tracking server. Views that a method makes itself, budgets of operations and the names in a tree of images are checked
here too, since that needs torch.

It imports nothing heavy for other studies, opens no image and asks no server.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from aps.data import NEED_A_PATH
from aps.data.manifest import Manifest
from aps.errors import UserError
from aps.files import expanded
from aps.findings import Findings
from aps.layout import encoder_file, encoder_job, manifest_of, study_folder
from aps.methods import Method
from aps.registry import METHODS, nearest
from aps.settings.blocks import SourceSettings
from aps.settings.study import SharedBlocks, Study, blocks_of
from aps.shortages import shortages
from aps.stages import STAGES
from aps.tracking.addresses import OFF, given_address, settled, shown, without_scheme
from aps.training.schedule import oddities, single_step
from aps.workflow.resources import check_resources

# Schemes of addresses that MLflow accepts. A database may name its driver too, as in mysql+pymysql.
SCHEMES = ("http", "https", "sqlite", "file", "postgresql", "mysql", "mssql", "databricks", "databricks-uc")

PARTS = {
    "folder": "folder",
    "images": "folder",
    "arrays": "file",
    "annotations": "file",
}  # what a key of `datasets` names


def problems(study: Study, findings: Findings | None = None) -> Iterator[str]:
    """A sentence for each problem that would stop a job; with the findings of `hints`, no tree is walked again."""
    findings = findings or Findings(study)
    yield from _results(study)
    for name in study.dataset_names():
        yield from _source(findings, name)
    for experiment, e in study.experiments.items():
        for stage in e.stages:
            yield from shortages(findings, experiment, stage)
        if "pretrain" in e.stages:
            yield from _views(study, experiment)
            yield from _length(study, experiment)
        file = encoder_file(study, experiment, e.seeds[0])
        if file is not None and encoder_job(study, experiment, e.seeds[0]) is None and not file.exists():
            yield f"experiment '{experiment}': encoder.weights: {file} does not exist; give the path of a .safetensors file"
    for stage in (*STAGES, "data", "report"):
        try:
            check_resources(study, stage)
        except UserError as error:
            yield str(error)
    if (address := given_address(study.tracking_uri)) is not None:
        yield from _address(address.strip())


def hints(study: Study, findings: Findings | None = None) -> Iterator[str]:
    """A sentence for each dataset that has to be prepared first, or again, each learning rate of an odd course, and what else
    no job fails for and its figures may mislead by."""
    findings = findings or Findings(study)
    for name in study.dataset_names():
        if not manifest_of(study, name).exists():
            yield f"dataset '{name}' is not prepared yet: `python -m aps data {name}`"
        elif (reason := findings.why_outdated(name)) is not None:
            yield f"dataset '{name}' will be prepared again ({reason}): `python -m aps data {name}`"
    for experiment in study.experiments:
        yield from _learning_rates(study, experiment)
        yield from _unread(study, experiment)
        yield from _one_encoder(study, experiment)


# --------------------------------------------------------------------------------------------------


def _results(study: Study) -> Iterator[str]:
    """A results folder in which nothing can be made. Only an attempt tells: root has every permission, also in /proc."""
    folder = study_folder(study)
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    try:
        with tempfile.TemporaryDirectory(prefix=".aps-", dir=above):
            pass
    except OSError as error:
        yield f"results {study.results}: nothing can be written in {above} ({error.strerror}); set another `results` folder"


def _source(findings: Findings, name: str) -> Iterator[str]:
    source = findings.study.source(name)
    if isinstance(source, SourceSettings):
        key, paths = f"sources.{name}", {"path": source.path} if source.path else {}
        if name in NEED_A_PATH and not paths:
            yield f"{key}.path is not set, and dataset '{name}' can't be downloaded; set it to the folder with its files"
    else:
        key, paths = f"datasets.{name}", source.paths
    for part, path in paths.items():
        kind = PARTS.get(part.rpartition(".")[2])
        try:
            found = expanded(path, f"{key}.{part}")
        except UserError as error:
            yield str(error)
            continue
        if not found.exists():
            yield f"{key}.{part}: {path} does not exist; correct the path"
        elif kind is not None and found.is_dir() != (kind == "folder"):
            yield f"{key}.{part}: {path} is not a {kind}; correct the path"
        elif part == "arrays" and not zipfile.is_zipfile(found):
            yield f"{key}.{part}: {path} is no readable .npz file; save its arrays by np.savez"
        elif part == "folder" or name == "folder":
            yield from _tree(findings, name, path, f"{key}.{part}")


def _tree(findings: Findings, name: str, tree: str, key: str) -> Iterator[str]:
    """What preparation would refuse in a tree of images for its names. One that is prepared was listed then."""
    source, manifest = findings.study.source(name), manifest_of(findings.study, name)
    if source.trust or (manifest.exists() and findings.why_outdated(name) is None):
        return
    from aps.data.folder import layout

    try:
        layout(manifest.parent, tree, key, getattr(source, "labels", True))
    except UserError as error:
        yield str(error)


def _learning_rates(study: Study, experiment: str) -> Iterator[str]:
    """Warmups that no epoch follows, and learning rates that rise where they should fall."""
    e = study.experiments[experiment]
    for stage in ("pretrain", "finetune", "detection"):
        for clause in oddities(stage, getattr(e, stage)) if stage in e.stages else ():
            yield f"warning: experiment '{experiment}': {clause}"
    with contextlib.suppress(UserError):  # which are problems, and not hints
        if "pretrain" in e.stages and (low := single_step(e.pretrain)) and _pretraining_steps(study, experiment) == 1:
            yield f"warning: experiment '{experiment}': {low}"


def _unread(study: Study, experiment: str) -> Iterator[str]:
    """Blocks that an experiment sets and its method does not read, so that runs that differ in them are one."""
    e = study.experiments[experiment]
    if "pretrain" not in e.stages:
        return
    read = blocks_of("pretrain", e.pretrain.method)
    for block in SharedBlocks.model_fields:
        keys = getattr(e, block).model_fields_set
        if block not in read and keys:
            yield (
                f"warning: experiment '{experiment}': pretrain.method {e.pretrain.method} reads no {block}, so "
                f"{', '.join(f'{block}.{key}' for key in sorted(keys))} change nothing"
            )


def _one_encoder(study: Study, experiment: str) -> Iterator[str]:
    """Seeds of which none has an encoder of its own, so that their spread says nothing of encoders."""
    e = study.experiments[experiment]
    fixed = e.encoder.weights != "random" and study.pretrain_source(experiment) is None
    if fixed and len(e.seeds) > 1 and any(STAGES[stage].encoder for stage in e.stages):
        yield (
            f"warning: experiment '{experiment}': all {len(e.seeds)} seeds start from one encoder ({e.encoder.weights}), so their "
            "spread is the evaluation's alone, and it counts as one seed"
        )


def _views(study: Study, experiment: str) -> Iterator[str]:
    """Views of a method's own that can't be made."""
    settings = study.stage_settings(experiment, study.experiments[experiment].seeds[0], "pretrain")
    if METHODS.load(settings.pretrain.method).views is Method.views:
        return
    from aps.training import contract
    from aps.training.networks import build_method

    try:
        with contract.blaming(settings.pretrain.method):
            contract.views(build_method(settings))
    except UserError as error:
        yield f"experiment '{experiment}': {error}"


def _length(study: Study, experiment: str) -> Iterator[str]:
    """A pretraining of less than one batch, or of one step that would learn nothing."""
    try:
        if _pretraining_steps(study, experiment) == 1:
            single_step(study.experiments[experiment].pretrain)
    except UserError as error:
        yield f"experiment '{experiment}': {error}"


def _pretraining_steps(study: Study, experiment: str) -> int | None:
    """Optimizer steps of a pretraining; None where images or a clock decide that are not there yet.

    Raises:
        UserError: its budget is less than one batch. It is counted by torch.
    """
    settings = study.stage_settings(experiment, study.experiments[experiment].seeds[0], "pretrain")
    s, path = settings.pretrain, manifest_of(study, settings.dataset.name)
    if s.budget is None:
        try:
            images = Manifest.read(path).splits["train"].count if path.exists() else 0
        except UserError:  # `aps.shortages` says it
            images = 0
        batches = s.epochs * (min(images, settings.dataset.train_limit or images) // s.batch_size)
        if batches != 1:  # more need no torch, to tell that they are no single step
            return batches or None
    elif s.budget.flops is None:
        return None
    from aps.training.cost import batches_within
    from aps.training.networks import build_method

    steps = build_method(settings).steps
    return steps * (1 if s.budget is None else batches_within(s.budget.flops, settings, steps))


def _address(address: str) -> Iterator[str]:
    setting = f"tracking_uri {shown(address) if re.search('[@?#]', address) else address}"
    if address.lower() == OFF:
        return
    if (sentence := without_scheme(address)) is not None:
        yield sentence
        return
    scheme = re.match(r"([\w+.-]+):", address)
    if scheme is None:
        if address.startswith(("databricks", "/", ".", "~")) or Path(address).is_dir():
            yield from _home(address)
            return
        yield f"{setting}: is no address and no folder; write http://HOST:PORT, sqlite:///FILE or {OFF}"
        return
    without_driver = scheme[1].split("+")[0].lower()
    if without_driver not in SCHEMES:
        yield f"{setting}: MLflow knows no '{scheme[1]}:'; {nearest(without_driver, SCHEMES)}"
    elif without_driver not in ("file", "databricks", "databricks-uc") and not address.startswith(f"{scheme[1]}://"):
        yield f"{setting}: write {scheme[1]}:// with two slashes"
    elif without_driver == "sqlite" and not address.startswith("sqlite:///"):
        yield f"{setting}: write sqlite:///FILE, with three slashes (four before an absolute path)"
    elif without_driver in ("http", "https"):
        yield from _host(setting, address)
    elif without_driver in ("file", "sqlite"):
        yield from _home(address)


def _home(address: str) -> Iterator[str]:
    """A home folder that nobody has."""
    try:
        settled(address)
    except UserError as error:
        yield str(error)


def _host(setting: str, address: str) -> Iterator[str]:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        yield f"{setting}: {error}; write http://HOST:PORT"
        return
    if not host:
        yield f"{setting}: names no host; write http://HOST:PORT"
        return
    try:
        socket.getaddrinfo(host, port)
    except OSError:
        yield f"{setting}: no host '{host}' is known from here; correct its name"
