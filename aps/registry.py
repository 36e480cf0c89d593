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
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from traceback import FrameSummary, extract_tb
from typing import Any

from aps.errors import Preempted, UserError
from aps.text import shorten

PACKAGE = Path(__file__).parent


def resolve(path: str, what: str = "") -> Any:
    """The object that `package.module:attribute` names.

    Args:
        what: a thing of the user's own that it is, `method 'x' (FILE)`; without it, mistakes are ours.

    Raises:
        UserError: the module of `what` does not exist or can't be imported, or lacks the attribute.
    """
    module, _, attribute = path.partition(":")
    if not what:
        return getattr(import_module(module), attribute)
    found = _imported(module, what)
    if not hasattr(found, attribute):
        raise UserError(f"{what}: has no '{attribute}', which its row or entry point {path} names; correct either")
    return getattr(found, attribute)


def _imported(module: str, what: str) -> Any:
    try:
        return import_module(module)
    except (UserError, Preempted, OSError, MemoryError, RuntimeError):  # the command line has sentences for these
        raise
    except SyntaxError as error:
        raise UserError(f"{what}: {error.filename}, line {error.lineno}: {error.msg}; correct it") from error
    except Exception as error:
        if isinstance(error, ImportError) and str(error.path).endswith(".so"):  # a library that does not load
            raise
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UserError(
                f"{what}: there is no module {error.name}; correct its row or entry point, which names {module}"
            ) from error
        raise UserError(f"{what}: can't be imported: {raised(error, file_of(module))}; correct it") from error


def raised(error: Exception, file: Path | None) -> str:
    """An exception, and the line of `file` that led to it: `KeyError: 'x' (line 7)`."""
    frame = frame_in(error, {str(file)})
    return f"{type(error).__name__}: {shorten(' '.join(str(error).split()), 200)}" + (
        f" (line {frame.lineno})" if frame is not None else ""
    )


def frame_in(error: Exception, files: Container[str | None]) -> FrameSummary | None:
    """The innermost place in one of the files that led to an exception; None if none did."""
    return next((frame for frame in reversed(extract_tb(error.__traceback__)) if frame.filename in files), None)


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


def _plain(name: str) -> str:
    """`barlow_twins` of a file and `BarlowTwins` of its class are one name."""
    return name.lower().replace("_", "")


class Registry:
    """Names of one kind.

    Args:
        group: group of entry points in which other packages add names.
        rows: name -> dotted path.
        folder: a folder of this package. Each of its files is a name, except those that start with an underscore.
        attribute: what such a file defines; by default the class with the file's name, whatever the case and the underscores.
        word: what one of them is called in sentences.
        contract: returns what is wrong with an object that is to be one of them, or None.
    """

    def __init__(
        self,
        group: str,
        rows: Mapping[str, str] | None = None,
        folder: str | None = None,
        attribute: str | None = None,
        *,
        word: str = "name",
        contract: Callable[[Any], str | None] = lambda found: None,
    ) -> None:
        self.word, self.group, self._attribute = word, group, attribute
        self._contract = contract
        self._checked: dict[str, Any] = {}  # objects that keep the contract, for planning asks for each many times
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

    def module(self, name: str) -> str:
        """The module that defines a name."""
        return self._path(name).partition(":")[0]

    def file(self, name: str) -> Path | None:
        """The file that defines a name, found without importing it; None where there is none."""
        return file_of(self._path(name)) if name in self else None

    def described(self, name: str) -> str:
        """A name and its file, for sentences about a mistake in it: `method 'x' (FILE)`."""
        return f"{self.word} '{name}'" + (f" ({shown_file(file)})" if (file := self.file(name)) is not None else "")

    def load(self, name: str) -> Any:
        """The object behind a name; imports its module.

        Raises:
            KeyError: the name is unknown.
            UserError: there is no such object, or it is not what the registry's names stand for.
        """
        found = self._found(name, self._path(name))
        if self._checked.get(name) is not found:
            if (problem := self._contract(found)) is not None:
                raise UserError(f"{self.described(name)}: {problem} (docs/extending.md)")
            self._checked[name] = found
        return found

    def _found(self, name: str, path: str) -> Any:
        module, _, attribute = path.partition(":")
        content = sys.modules.get(module) or _imported(module, self.described(name))
        if attribute:
            return getattr(content, attribute) if hasattr(content, attribute) else resolve(path, self.described(name))
        classes = (v for k, v in vars(content).items() if isinstance(v, type) and _plain(k) == _plain(name))
        if (found := next(classes, None)) is None:
            raise UserError(
                f"{self.described(name)}: has no class {name}, in upper or lower case, with or without underscores; give it "
                "one, since a file's name is that of its class"
            )
        return found

    def unknown(self, name: str) -> str:
        """The end of a sentence about an unknown name."""
        return nearest(name, self.names())


# --------------------------------------------------------------------------------------------------
# What the names stand for. What a method or a dataset does with its arguments shows when it is called.


def _a_method(found: Any) -> str | None:
    if not isinstance(found, type) or not issubclass(found, resolve("aps.methods:Method")):
        return f"{_type_of(found)} is no method; make it a class that inherits from aps.methods.Method"
    for key, base in (("Settings", "PretrainSettings"), ("Views", "ViewSettings")):
        block = getattr(found, key)
        if not isinstance(block, type) or not issubclass(block, resolve(f"aps.settings.blocks:{base}")):
            return f"its {key} does not inherit from aps.settings.blocks.{base}; add that"
        if missing := [field for field, info in block.model_fields.items() if info.is_required()]:  # type: ignore[attr-defined]
            return f"'{missing[0]}' of its {key} has no default; give it one, even where each study sets it"
        try:
            block()
        except Exception as error:  # validators are the user's code
            return f"the defaults of its {key} are refused ({raised(error, None)}); correct them"
    return None


def _a_class(found: Any) -> str | None:
    return None if isinstance(found, type) else f"{_type_of(found)} is no class; name one"


def _a_function(found: Any) -> str | None:
    return None if callable(found) else f"{_type_of(found)} is no function; name one"


def _an_arch(found: Any) -> str | None:
    if not isinstance(found, resolve("aps.models.archs:Arch")):
        return f"{_type_of(found)} is no architecture; write aps.models.archs.Arch(width, depth, heads)"
    whole = all(type(number) is int and number > 0 for number in found)
    return None if whole else f"{found} is no architecture; its width, depth and heads are whole numbers above 0"


def _type_of(found: Any) -> str:
    return f"class {found.__name__}" if isinstance(found, type) else f"a value of type {type(found).__name__}"


METHODS = Registry("aps.methods", folder="methods", word="method", contract=_a_method)
ENGINES = Registry(
    "aps.engines", folder="detection/engines", attribute="Engine", word="detection engine", contract=_a_class
)
STRATEGIES = Registry(
    "aps.strategies",
    {
        "asymmetric": "aps.sampling:asymmetric",
        "random": "aps.sampling:random",
        "full": "aps.sampling:full",
    },
    word="sampling strategy",
    contract=_a_function,
)
ARCHS = Registry(
    "aps.archs",
    {
        "micro": "aps.models.archs:MICRO",
        "tiny": "aps.models.archs:TINY",
        "small": "aps.models.archs:SMALL",
        "base": "aps.models.archs:BASE",
    },
    word="architecture",
    contract=_an_arch,
)
# Datasets: a function (folder, source, name) -> Manifest, see aps/data/__init__.py.
DATASETS = Registry(
    "aps.datasets",
    {
        "digits": "aps.data.digits:prepare",
        "fashion_mnist": "aps.data.fashion_mnist:prepare",
        "cifar10": "aps.data.cifar:prepare",
        "cifar100": "aps.data.cifar:prepare",
        "imagenet1k": "aps.data.imagenet:prepare",
        "folder": "aps.data.folder:prepare",
    },
    word="dataset",
    contract=_a_function,
)
USER_DATASETS = ("folder",)  # names of datasets whose content is whatever the user's source holds
DETECTION_DATASETS = Registry(
    "aps.detection_datasets",
    {
        "digits_coco": "aps.data.composites:prepare",
        "fashion_coco": "aps.data.composites:prepare",
        "cifar_coco": "aps.data.composites:prepare",
        "coco2017": "aps.data.coco:prepare",
    },
    word="dataset",
    contract=_a_function,
)
REGISTRIES = (METHODS, ENGINES, STRATEGIES, ARCHS, DATASETS, DETECTION_DATASETS)

# Checks of every experiment's settings: functions of the experiment that raise ValueError. The check of one stage is in
# its row of aps/stages.py.
CHECKS = ("aps.models.archs:check", "aps.published:check")
STUDY_CHECKS = ("aps.layout:check_encoders",)  # of a study as a whole, likewise
