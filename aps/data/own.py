"""Data of the user's own, as a study's block `datasets` names them: a tree of images, a .npz file, or COCO files."""

from __future__ import annotations

from pathlib import Path

from aps.data import array_files, coco_files, folder
from aps.data.manifest import Manifest
from aps.settings.blocks import OwnDataset


def prepare(out: Path, source: OwnDataset, name: str) -> Manifest:
    """The manifest of the dataset `name`; what loaders need is written into `out`.

    Raises:
        UserError: a file is missing or broken, or what it holds is not what the entry says.
    """
    key = f"datasets.{name}"
    if source.coco is not None:
        files = {
            split: coco_files.Files(Path(own.images).expanduser(), Path(own.annotations).expanduser())
            for split, own in (("train", source.coco.train), ("val", source.coco.val))
        }
        manifest = coco_files.describe(out, name, files, f"{key}.coco", source.masks)
    elif source.arrays is not None:
        manifest = array_files.describe(out, name, source.arrays, f"{key}.arrays", source.labels)
    else:
        assert source.folder is not None
        manifest = folder.describe(out, name, source.folder, f"{key}.folder", source.labels)
    return manifest.model_copy(update={"source": source.identity})
