"""Asymmetric Patch Sampling (arXiv 2306.02854): pretraining, evaluation and transfer as one pipeline.

    import aps

    aps.run("study.yaml")                       the whole study, as `aps run` does it
    aps.pretrain("photos", encoder={...})       one encoder, with settings as in YAML
    aps.load("results/.../pretrain")            an encoder, classifier or detector, ready to use

`import aps` is quick: each of these names imports its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aps.api import pretrain, run
    from aps.inference.load import load

__all__ = ["__version__", "load", "pretrain", "run"]

__version__ = "0.2.0"

_MODULES = {"load": "aps.inference.load", "pretrain": "aps.api", "run": "aps.api"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'aps' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
