"""Reads YAML into a validated study: files, includes, inheritance, overrides.

Blocks merge key by key; lists and values are replaced (config/README.md has the order). Everything is validated here,
before the first job; no other module reads a study's YAML.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from aps.errors import UserError
from aps.registry import nearest
from aps.settings.base import NAME, NAME_LETTERS, check_distinct, optional_blocks
from aps.settings.blocks import BudgetSettings, UserDataset, name_only
from aps.settings.checks import check
from aps.settings.sentences import sentence, shown
from aps.settings.study import Study, StudySettings, experiment_model, method_of
from aps.stages import STAGES

LONG_NAME = re.compile(r"\w{101,}")  # shortened in error messages
DEEPEST = 50  # levels of nested blocks in YAML; a study has five
RESERVED_NAMES = (
    "data",
    "report",
    "mlflow.db",
    "mlartifacts",
    "checkpoints",
    "logs",
    "benchmarks",
)  # folders of results
# Blocks of which null is a value, as (block, key), and blocks that have one of several keys.
BLOCKS = {**{name: row.block() for name, row in STAGES.items()}, "budget": BudgetSettings, "datasets.NAME": UserDataset}
MAY_BE_NULL = frozenset((name, key) for name, block in BLOCKS.items() for key in optional_blocks(block))
ALTERNATIVES = {name: block.alternatives for name, block in BLOCKS.items()}
SHARED_FOLDERS = ("data", "runs", "mlflow.db", "mlartifacts")  # of all studies, where a study's folder lies too


def load_study(files: Sequence[str | Path], overrides: dict[str, Any] | None = None) -> Study:
    """Read, merge and validate a study.

    Args:
        files: YAML files, later ones laid over earlier ones.
        overrides: settings laid over all of them (from `--set`, or from Snakemake's `--config`).

    Raises:
        UserError: a file is missing or not YAML, a key is unknown, a value has the wrong type or range, an override
            empties a block, `results` names a file.
    """
    raw, overrides = read_files(files), overrides or {}
    where = ", ".join(str(f) for f in files) or "settings"
    if (key := _emptied(raw, overrides)) is not None:
        raise UserError(
            f"{where}: {key} = null, laid over it, changes nothing, as an empty block never does; leave it out, set keys of the "
            "block, or remove the block from the file"
        )
    raw = _merge(raw, overrides)
    try:
        study = _validate(raw, where)
        _check_folder(study, where)
        return study
    except UserError as error:
        raise UserError(LONG_NAME.sub(lambda found: f"{found[0][:57]}...", str(error))) from None


def read_files(files: Sequence[str | Path]) -> dict[str, Any]:
    """The plain settings of YAML files, later ones laid over earlier ones, before any is validated.

    Raises:
        UserError: a file, or one that it includes, is missing, not UTF-8, not YAML or no block of keys.
    """
    raw: dict[str, Any] = {}
    for file in files:
        raw = _merge(raw, _read(Path(file)))
    return raw


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """`a.b=value` pairs as nested settings; values are read as YAML. Raises UserError for a pair of another form."""
    result: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--set {pair}: write KEY=VALUE, for example --set defaults.pretrain.epochs=10")
        nested = read_value(text, f"--set {pair}")
        if key.count(".") > DEEPEST:
            raise UserError(_too_deep(f"--set {shown(pair)}"))
        for part in reversed(key.split(".")):
            nested = {part: nested}
        result = _merge(result, nested)
    return result


def check_names(files: Sequence[str | Path], pairs: list[str]) -> None:
    """Raises UserError where a pair `experiments.NAME.KEY=VALUE` names an experiment of no file: a typo would make a new one.

    `experiments.NAME={...}` makes one.
    """
    keys = [pair.partition("=")[0].split(".") for pair in pairs]
    made = {key[1] for key in keys if key[0] == "experiments" and len(key) == 2}
    changed = [key for key in keys if key[0] == "experiments" and len(key) > 2 and key[1] not in made]
    if not changed:
        return
    known = read_files(files).get("experiments")
    for key in changed:
        if isinstance(known, dict) and key[1] not in known:
            raise UserError(
                f"--set {'.'.join(key)}: the study has no experiment {shown(key[1])}; {nearest(key[1], known)} "
                "(--set 'experiments.NAME={...}' makes a new one)"
            )


def read_value(text: str, where: str) -> Any:
    """Parse YAML text. Raises UserError where it is not valid YAML."""
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split()).replace("<unicode string>", where)  # PyYAML's name for a text
        raise UserError(f"{where}: not valid YAML: {reason}; correct it there") from None
    except RecursionError:
        raise UserError(_too_deep(where)) from None
    except ValueError as error:  # an impossible date, or a number of more digits than Python reads
        raise UserError(f"{where}: not valid YAML: {error}; correct the value, or quote it if it is text") from None
    if _depth_exceeds(value, DEEPEST):
        raise UserError(_too_deep(where))
    return value


def _too_deep(where: str) -> str:
    return f"{where}: blocks are nested more than {DEEPEST} deep, or hold themselves; write a study's keys only"


def _depth_exceeds(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        inner = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list)]
        level = list({id(x): x for values in inner for x in values}.values())  # an alias counts once
        if not level:
            return False
    return True


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML, but a key given twice in one block is an error instead of a silent override."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *name`, which flatten_mapping resolves
            continue
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        if not isinstance(key, str):
            problem = f"key {key!r} is not text; quote it if it is a name"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)

# Numbers as in YAML 1.2, not 1.1: 010 is ten, not octal; 24:00:00 is text, not a number in base sixty; 1e-3 is a number,
# not text.
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in (_INT, _FLOAT)]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_UniqueKeyLoader.add_implicit_resolver(
    _INT, re.compile(r"^[-+]?(0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)$"), list("-+0123456789")
)
_UniqueKeyLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 0 if re.match(r"[-+]?0[box]", text) else 10)


_UniqueKeyLoader.add_constructor(_INT, _whole_number)


def _read(file: Path, parents: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file laid over the files that it includes, whose paths are relative to it."""
    if file.resolve() in parents:
        raise UserError(f"{file}: includes itself through {' -> '.join(str(p) for p in parents)}; remove one include")
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give an existing YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not valid YAML: {error.reason} at byte {error.start}; save it as UTF-8") from None
    content = read_value(text, str(file))
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(
            f"{file}: a study is a block of keys (study, defaults, experiments), not a {type(content).__name__}; write KEY: VALUE"
        )
    merged: dict[str, Any] = {}
    includes = content.pop("include", None) or []
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise UserError(f"{file}: include = {shown(includes)}: should be a list of files, for example [cifar.yaml]")
    for name in includes:
        merged = _merge(merged, _with_defaults(_read(file.parent / name, (*parents, file.resolve()))))
    return _merge(merged, content)


def _with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """Lay the defaults of an included study under its experiments, so that they don't apply to other studies' ones."""
    defaults = raw.pop("defaults", None) or {}
    experiments = raw.get("experiments")
    if isinstance(experiments, dict) and isinstance(defaults, dict):
        for name, settings in experiments.items():
            settings = {} if settings is None else settings
            if isinstance(settings, dict) and "inherits" not in settings:
                experiments[name] = _merge(defaults, settings)
    raw.pop("study", None)
    raw.pop("question", None)
    return raw


def _merge(below: Any, above: Any, block: str = "") -> Any:
    """Lay `above` over `below`: blocks merge key by key, everything else is replaced. An empty block changes nothing, unless
    null is a value of its key. Of keys that are alternatives, the one in `above` is left.

    `dataset: NAME` is short for `dataset: {name: NAME}`.

    Args:
        block: the key that both stand under, as `_inner` gives it.
    """
    if isinstance(below, dict) and isinstance(above, dict):
        alternatives = ALTERNATIVES.get(block, ())
        replaced = any(above.get(key) is not None for key in alternatives)
        merged = {key: value for key, value in below.items() if not replaced or key not in {*alternatives} - {*above}}
        for key, value in above.items():
            if key == "dataset" and {type(value), type(below.get(key))} == {str, dict}:
                merged[key] = _merge(name_only(below[key]), name_only(value), key)
            elif key in below and (block, key) not in (MAY_BE_NULL if value is None else ()):
                merged[key] = _merge(below[key], value, _inner(block, key))
            else:
                merged[key] = value
        return merged
    return below if isinstance(below, dict) and above is None else above


def _inner(block: str, key: Any) -> str:
    """The name for what stands under a key of a block: the key, or `experiments.NAME` and the like under a name of the user's."""
    return f"{block}.NAME" if block in ("experiments", "datasets", "sources") else str(key)


def _emptied(below: Any, above: Any, block: str = "") -> str | None:
    """The first key that is a block in `below` and null in `above`, where null is no value; None where there is none."""
    for key in above if isinstance(below, dict) and isinstance(above, dict) else ():
        if isinstance(below.get(key), dict) and not (above[key] is None and (block, key) in MAY_BE_NULL):
            if above[key] is None:
                return str(key)
            if (inner := _emptied(below[key], above[key], _inner(block, key))) is not None:
                return f"{key}.{inner}"
    return None


def _inherit(
    name: str, experiments: dict[str, Any], defaults: dict[str, Any], where: str, chain: tuple[str, ...] = ()
) -> Any:
    """The settings of an experiment laid over those it inherits; `chain` names the experiments that inherit from it."""
    settings = experiments[name] if experiments[name] is not None else {}
    if not isinstance(settings, dict):
        raise UserError(f"{where}: experiment '{name}': must be a block of settings, not {settings!r}")
    parent = settings.get("inherits")
    if parent is None:
        return _merge(defaults, settings)
    if not isinstance(parent, str) or parent not in experiments:
        raise UserError(
            f"{where}: experiment '{name}': inherits '{parent}', which does not exist; {nearest(str(parent), list(experiments))}"
        )
    if parent in (*chain, name):
        raise UserError(
            f"{where}: experiment '{name}': inherits itself through {' -> '.join((*chain, name, parent))}; remove one"
        )
    base = _inherit(parent, experiments, defaults, where, (*chain, name))
    base = {key: value for key, value in base.items() if key not in ("inherits", "description", "published")}
    return _merge(base, settings)


def _validate(raw: dict[str, Any], where: str) -> Study:
    experiments = raw.get("experiments")
    if not isinstance(experiments, dict) or not experiments:
        raise UserError(f"{where}: no experiments; add an 'experiments:' block with at least one")
    for name in experiments:
        if not re.fullmatch(NAME, name, re.ASCII) or name in RESERVED_NAMES:
            raise UserError(
                f"{where}: experiment name '{name if len(name) <= 60 else name[:57] + '...'}' can't be used as a folder; use at most {NAME_LETTERS} letters, digits, _ . - and none of {', '.join(RESERVED_NAMES)}"
            )
    if raw.get("study") in SHARED_FOLDERS:
        raise UserError(
            f"{where}: study = {shown(raw['study'])}: is a folder of `results` that all studies share; choose another name"
        )
    defaults = raw["defaults"] if raw.get("defaults") is not None else {}
    if not isinstance(defaults, dict):
        raise UserError(
            f"{where}: defaults = {shown(defaults)}: should be a block of settings; write KEY: VALUE under it"
        )
    resolved = {}
    for name in experiments:
        merged = _inherit(name, experiments, defaults, where)
        model = experiment_model(method_of(merged))
        try:
            resolved[name] = model.model_validate(merged)
        except ValidationError as error:
            raise UserError(sentence(where, f"experiment '{name}': ", error, model)) from None
    _check_defaults(defaults, where)
    try:
        study = Study.model_validate({**raw, "experiments": resolved})
    except ValidationError as error:
        raise UserError(sentence(where, "", error, StudySettings)) from None
    check(study, where)
    return study


def _check_folder(study: Study, where: str) -> None:
    """Raises UserError where something else than a folder stands in the way of the study's results."""
    folder = Path(study.results) / study.study
    nearest_one = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), None)
    if nearest_one is not None and not os.path.isdir(nearest_one):
        raise UserError(
            f"{where}: results = {shown(study.results)}: {folder}/.lock: cannot be written (Not a directory); set another "
            f"`results` folder, or move {nearest_one} away"
        )


def _check_defaults(defaults: dict[str, Any], where: str) -> None:
    """Raises UserError for a value of `defaults` that is invalid in every experiment, even if all of them replace it.

    Keys that depend on other keys, or on the method, are checked in the experiments only.
    """
    model = experiment_model(method_of(defaults))
    try:
        model.model_validate(defaults)
    except ValidationError as error:
        elsewhere = ("missing", "extra_forbidden", "value_error")
        errors: list[Any] = [
            {key: one[key] for key in ("type", "loc", "input", "ctx") if key in one}
            for one in error.errors()
            if one["type"] not in elsewhere and (one["loc"][1:] == () or one["loc"][0] not in ("pretrain", "views"))
        ]
        if errors:
            raise UserError(
                sentence(where, "defaults: ", ValidationError.from_exception_data("defaults", errors), model)
            ) from None
    for key in ("stages", "seeds"):
        if isinstance(values := defaults.get(key), list):
            try:
                check_distinct(key, tuple(values))
            except ValueError as error:
                raise UserError(f"{where}: defaults: {error}") from None
