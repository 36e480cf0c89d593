"""COCO transfer: object detection and instance segmentation on the encoder. Planning imports this file: no torch here."""

from importlib.util import find_spec

from aps.errors import UserError

# What an engine needs beyond the package's own requirements, and the command that brings it.
NEEDED = {"detectron2": ("detectron2", "pip install --no-build-isolation '.[detectron2]'")}


def check_engine(engine: str) -> None:
    """Raises UserError where the library of `engine` is not installed; imports nothing of it."""
    module, install = NEEDED.get(engine, (None, None))
    if module is not None and find_spec(module) is None:
        raise UserError(
            f"detection.engine '{engine}': {module} is not installed; install it by `{install}` in the repository, "
            "or set detection.engine: torchvision (docs/detection.md)"
        )
