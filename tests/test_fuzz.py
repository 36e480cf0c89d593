"""Whatever a file holds, nothing but our own exception: settings, weights, the small files that a run leaves.

The examples of a quick run are always the same; the slow one draws new ones.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tiny_study import STUDY, put

from aps.data.manifest import Manifest
from aps.errors import UserError
from aps.journal import read_history
from aps.models.encoder import build_encoder
from aps.models.weights import load_encoder, read_info
from aps.results import _read_clock
from aps.runtime.slurm import _identity, _is_alive, _read_mark
from aps.seals import damage, read_metrics, seal
from aps.settings.blocks import EncoderSettings
from aps.settings.reading import load_study, parse_overrides
from aps.settings.study import StageSettings
from aps.tracking.state import read_state

QUICK, SLOW = 40, 300
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def fuzzed(*strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """A test of few examples, and a slow one of many."""

    def decorate(test: Callable[..., None]) -> Any:
        @pytest.mark.parametrize("examples", [QUICK, pytest.param(SLOW, marks=[pytest.mark.slow, pytest.mark.soak])])
        def run(examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
            monkeypatch.chdir(tmp_path)
            quick = settings(
                max_examples=examples, deadline=None, derandomize=examples == QUICK, database=None,
                suppress_health_check=CHECKS, phases=[Phase.generate, Phase.shrink],
            )  # fmt: skip
            quick(given(st.tuples(*strategies))(lambda drawn: test(tmp_path, *drawn)))()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


def ours(act: Callable[[], Any]) -> None:
    """A sentence on one line, or no error at all."""
    try:
        act()
    except UserError as error:
        text = str(error)
        assert text and "Traceback" not in text and len(text) < 3000, text


PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 3), st.floats(), st.text(max_size=8),
    st.text(string.ascii_letters + "-_./:~{}$ ", max_size=130),
    st.sampled_from(["aps", "random", "pretrain", "digits", "experiment:aps", "x.safetensors", "rand-m9", "1e-3", "auto"]),
)  # fmt: skip
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)


def paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every place in nested blocks and lists."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(found for key, value in inner for found in paths(value, (*path, key)))]


DEFAULTS = {name: {} for name in ("dataset", "encoder", "views", "sampling", "pretrain", "finetune", "linear_probe", "knn",
                                   "embed", "detection")}  # fmt: skip
KEYS = [
    *(("defaults", stage, key) for stage, keys in {
        "pretrain": ("method", "lr", "batch_size", "accumulate", "epochs", "warmup_epochs", "temperature", "betas", "budget", "knn_every"),
        "finetune": ("lr", "mixup", "holdout", "rand_augment", "ema", "dataset"),
        "linear_probe": ("lrs", "holdout", "crop_scale"), "knn": ("k", "temperature"), "embed": ("queries", "dataset"),
        "sampling": ("strategy", "ratio", "gamma", "samplings"), "views": ("crop_scale", "blur", "grayscale"),
        "encoder": ("weights", "arch", "dim", "heads", "image_size", "patch_size", "mlp_ratio"),
        "detection": ("engine", "window", "global_blocks", "lr_drops", "pyramid_scales", "dataset"),
    }.items() for key in keys),
    ("resources",), ("resources", "pretrain"), ("datasets",), ("datasets", "mine"), ("sources", "digits"), ("include",),
    ("tracking_uri",), ("container",), ("results",), ("study",), ("experiments", "aps", "inherits"),
]  # fmt: skip
PLACES = st.sampled_from([*paths(STUDY)[1:], *KEYS])


@fuzzed(st.lists(st.tuples(PLACES, VALUES), min_size=1, max_size=3))
def test_a_study_with_any_value_at_any_place_is_right_or_refused(folder: Path, changes: list[Any]) -> None:
    study: Any = STUDY
    for path, value in changes:
        try:
            study = put(study, path, value)
        except (TypeError, AttributeError, KeyError, IndexError, ValueError):  # what was there is no block any more
            continue
    text = yaml.safe_dump(study, allow_unicode=True)
    (folder / "study.yaml").write_text(text, errors="surrogatepass")
    ours(lambda: load_study(["study.yaml"]))


@fuzzed(st.binary(max_size=200) | st.text(max_size=200).map(lambda x: x.encode(errors="surrogatepass")))
def test_any_bytes_are_a_study_or_refused(folder: Path, content: bytes) -> None:
    (folder / "study.yaml").write_bytes(content)
    ours(lambda: load_study(["study.yaml"]))


@fuzzed(
    st.lists(
        st.text(max_size=30)
        | st.tuples(st.sampled_from(["study", "defaults.knn.k", "a.b"]), st.text(max_size=12)).map("=".join),
        max_size=3,
    )
)
def test_any_override_is_right_or_refused(folder: Path, pairs: list[str]) -> None:
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    ours(lambda: load_study(["study.yaml"], parse_overrides(pairs)))


@fuzzed(st.text(max_size=60) | VALUES.map(lambda x: json.dumps(x)))
def test_any_text_is_a_stages_settings_or_refused(folder: Path, text: str) -> None:
    ours(lambda: StageSettings.from_json(text))


# --------------------------------------------------------------------------------------------------
# Weights.

SETTINGS = EncoderSettings(**STUDY["defaults"]["encoder"])
TENSORS = {name: x.clone() for name, x in build_encoder(SETTINGS).state_dict().items()}
WHOLE = save(TENSORS)
HEADER = json.loads(WHOLE[8 : 8 + int.from_bytes(WHOLE[:8], "little")])
SHAPES = st.lists(st.integers(0, 30), max_size=4)


def weights(folder: Path, content: bytes) -> None:
    file = folder / "x.safetensors"
    file.write_bytes(content)
    ours(lambda: load_encoder(file, SETTINGS))
    ours(lambda: read_info(file))


@fuzzed(st.binary(max_size=100), st.integers(0, len(WHOLE)), st.booleans())
def test_weights_with_any_bytes_at_any_place_are_right_or_refused(
    folder: Path, noise: bytes, at: int, cut: bool
) -> None:
    weights(folder, WHOLE[:at] + noise + (b"" if cut else WHOLE[at + len(noise) :]))


@fuzzed(st.sampled_from(paths(HEADER)), VALUES)
def test_weights_with_any_value_in_their_header_are_right_or_refused(folder: Path, path: Any, value: Any) -> None:
    header = json.dumps(put(HEADER, path, value) if path else value).encode()
    weights(folder, len(header).to_bytes(8, "little") + header + WHOLE[8 + int.from_bytes(WHOLE[:8], "little") :])


@fuzzed(
    st.sampled_from(sorted(TENSORS)) | st.text(max_size=20),
    SHAPES,
    st.sampled_from([torch.float32, torch.float16, torch.int8, torch.float8_e5m2, torch.complex64, torch.bool]),
)
def test_weights_with_a_tensor_of_any_shape_and_type_are_right_or_refused(
    folder: Path, name: str, shape: list[int], kind: torch.dtype
) -> None:
    try:
        content = save({**TENSORS, name: torch.zeros(shape).to(kind)})
    except Exception:  # a name that the library itself does not write
        return
    weights(folder, content)


@fuzzed(
    st.dictionaries(
        st.sampled_from(["aps_encoder", "aps_info", "aps_sha256", "x"]), st.text(max_size=40) | VALUES.map(json.dumps)
    )
)
def test_weights_with_any_metadata_are_right_or_refused(folder: Path, metadata: dict[str, str]) -> None:
    try:
        content = save(TENSORS, {key: value for key, value in metadata.items()})
    except UnicodeEncodeError:
        return
    weights(folder, content)


# --------------------------------------------------------------------------------------------------
# Small files that a run leaves.

CONTENTS = st.one_of(
    st.binary(max_size=80),
    VALUES.map(lambda x: json.dumps(x).encode()),
    st.dictionaries(
        st.sampled_from(["step", "seconds", "started", "slurm_job", "host", "pid", "boot", "born", "about", "address", "sha256",
                         "files", "digest", "name", "kind", "splits", "classes", "run_id", "complete", "status"]),
        VALUES, max_size=6,
    ).map(lambda x: json.dumps(x).encode()),
    st.lists(VALUES, max_size=4).map(lambda x: b"\n".join(json.dumps(y).encode() for y in x) + b"\n"),
)  # fmt: skip


def look_back(file: Path) -> None:
    mark = _read_mark(file)
    if mark.get("pid") != _identity(1):
        _is_alive({**mark, "born": None})


def look_at_metrics(file: Path) -> None:
    metrics = read_metrics(file)
    damage(file.parent, metrics, whole=True)


READERS = {
    "history.jsonl": read_history,
    "run.json": _read_clock,
    "tracking.json": read_state,
    "attempt.json": look_back,
    "metrics.json": look_at_metrics,
    "manifest.json": Manifest.read,
}


@fuzzed(st.sampled_from(sorted(READERS)), CONTENTS)
def test_any_content_of_a_small_file_is_read_passed_over_or_refused(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    ours(lambda: READERS[name](folder / name))


@fuzzed(st.dictionaries(st.sampled_from(["files", "settings", "metrics", "stage"]), VALUES, max_size=3))
def test_a_seal_over_any_content_is_ours_to_read(folder: Path, content: dict[str, Any]) -> None:
    (folder / "metrics.json").write_text(json.dumps(seal({**content})))
    ours(lambda: read_metrics(folder / "metrics.json"))
