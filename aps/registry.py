"""Registries: the names that settings may use for methods, datasets, architectures and the like, and the code of each.

A registry maps a name to a dotted path, `package.module:attribute`, which is imported only when it is used. So planning
knows every name without importing torch. A name comes from one of three places:

    a row below          strategies, architectures, datasets
    a file of a folder   methods (`aps/methods`), detection engines (`aps/detection/engines`): the file's name
    another package      its Python entry points, in the group that the registry names (docs/extending.md)

It knows only names. What a method or a dataset has to implement is written in their packages.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent


def resolve(path: str) -> Any:
    """The object that `package.module:attribute` names."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def file_of(path: str) -> Path | None:
    """The file of the module in `package.module:attribute`, found without importing it; None where there is none."""
    try:
        spec = find_spec(path.partition(":")[0])
    except Exception:  # whatever the package around it does when it is imported
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def shown_file(file: Path | None) -> str:
    """A file for people: one of this package from the package on, so that a sentence is the same everywhere."""
    if file is None:
        return "its file"
    return str(file.relative_to(PACKAGE.parent) if file.is_relative_to(PACKAGE) else file)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the closest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


class Registry:
    """Names of one kind.

    Args:
        word: what one of them is called in sentences.
        group: group of entry points in which other packages add names.
        rows: name -> dotted path.
        folder: a folder of this package. Each of its files is a name, except those that start with an underscore.
        attribute: what such a file defines; by default the class with the file's name, in any case.
    """

    def __init__(
        self,
        word: str,
        group: str,
        rows: Mapping[str, str] | None = None,
        folder: str | None = None,
        attribute: str | None = None,
    ) -> None:
        self.word, self.group, self._attribute = word, group, attribute
        self._rows = dict(rows or {})
        if folder is not None:
            package = f"aps.{folder.replace('/', '.')}"
            files = sorted((PACKAGE / folder).glob("[a-z]*.py"))
            self._rows |= {file.stem: f"{package}.{file.stem}:{attribute or ''}" for file in files}

    @cached_property
    def _entry_points(self) -> dict[str, str]:
        return {entry.name: entry.value for entry in entry_points(group=self.group)}

    def names(self) -> list[str]:
        """Every name, sorted."""
        return sorted({*self._rows, *self._entry_points})

    def __contains__(self, name: object) -> bool:
        return name in self._rows or name in self._entry_points  # entry points last: reading them is slow

    def _path(self, name: str) -> str:
        return self._rows[name] if name in self._rows else self._entry_points[name]

    def file(self, name: str) -> Path | None:
        """The file that defines a name, found without importing it; None where there is none."""
        return file_of(self._path(name)) if name in self else None

    def described(self, name: str) -> str:
        """A name and its file, for sentences about a mistake in it: `method 'x' (FILE)`."""
        return f"{self.word} '{name}'" + (f" ({shown_file(file)})" if (file := self.file(name)) is not None else "")

    def load(self, name: str) -> Any:
        """The object behind a name; imports its module. Raises KeyError if the name is unknown."""
        path = self._path(name)
        if not path.endswith(":"):
            return resolve(path)
        module = import_module(path.removesuffix(":"))
        return next(v for k, v in vars(module).items() if isinstance(v, type) and k.lower() == name.lower())

    def unknown(self, name: str) -> str:
        """The end of a sentence about an unknown name."""
        return nearest(name, self.names())


METHODS = Registry("method", "aps.methods", folder="methods")
ENGINES = Registry("detection engine", "aps.engines", folder="detection/engines", attribute="Engine")
STRATEGIES = Registry(
    "sampling strategy",
    "aps.strategies",
    {
        "asymmetric": "aps.sampling:asymmetric",
        "random": "aps.sampling:random",
        "full": "aps.sampling:full",
    },
)
ARCHS = Registry(
    "architecture",
    "aps.archs",
    {
        "micro": "aps.models.archs:MICRO",
        "tiny": "aps.models.archs:TINY",
        "small": "aps.models.archs:SMALL",
        "base": "aps.models.archs:BASE",
    },
)
# Datasets: a function (folder, source, name) -> Manifest, see aps/data/__init__.py.
DATASETS = Registry(
    "dataset",
    "aps.datasets",
    {
        "digits": "aps.data.digits:prepare",
        "fashion_mnist": "aps.data.fashion_mnist:prepare",
        "cifar10": "aps.data.cifar:prepare",
        "cifar100": "aps.data.cifar:prepare",
        "imagenet1k": "aps.data.imagenet:prepare",
        "folder": "aps.data.folder:prepare",
    },
)
USER_DATASETS = ("folder",)  # names of datasets whose content is whatever the user's source holds
DETECTION_DATASETS = Registry(
    "dataset",
    "aps.detection_datasets",
    {
        "digits_coco": "aps.data.composites:prepare",
        "fashion_coco": "aps.data.composites:prepare",
        "cifar_coco": "aps.data.composites:prepare",
        "coco2017": "aps.data.coco:prepare",
    },
)

# Checks of every experiment's settings: functions of the experiment that raise ValueError. The check of one stage is in
# its row of aps/stages.py.
CHECKS = ("aps.models.archs:check", "aps.published:check")
