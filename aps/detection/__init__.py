"""Object detection and instance segmentation on the encoder, scored on COCO data. Planning imports this file: no torch."""

from importlib.util import find_spec
from typing import Any

from aps.errors import UserError
from aps.registry import ENGINES

# Libraries that an engine needs beyond the package's requirements, and the command that installs them.
NEEDED = {"detectron2": ("detectron2", "pip install --no-build-isolation '.[detectron2]'")}


def check_engine(engine: str) -> None:
    """Raises UserError where the library of `engine` is not installed; does not import it."""
    module, install = NEEDED.get(engine, (None, None))
    if module is not None and find_spec(module) is None:
        raise UserError(
            f"detection.engine '{engine}': {module} is not installed; install it by `{install}` in the repository, "
            "or set detection.engine: torchvision (docs/detection.md)"
        )


def load_engine(engine: str) -> Any:
    """The class `Engine` of an engine's file. Raises UserError where its library is missing or does not import."""
    check_engine(engine)
    try:
        return ENGINES.load(engine)
    except (ImportError, UserError) as broken:
        error = broken if isinstance(broken, ImportError) else broken.__cause__
        if engine not in NEEDED or not isinstance(error, ImportError):
            raise
        module, install = NEEDED[engine]
        raise UserError(
            f"detection.engine '{engine}': {module} is installed but does not import ({error}); build it for the torch that "
            f"is installed, by `{install}` in the repository, or set detection.engine: torchvision (docs/detection.md)"
        ) from error
