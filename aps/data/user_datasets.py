"""Users' datasets, as a study's block `datasets` names them: a tree of images, a .npz file, or COCO files."""

from __future__ import annotations

from pathlib import Path

from aps.data import array_files, coco_files, folder
from aps.data.manifest import Manifest
from aps.files import expanded
from aps.settings.blocks import UserDataset


def prepare(out: Path, source: UserDataset, name: str) -> Manifest:
    """Write what loaders need into `out`, and return the manifest of the dataset `name`.

    Raises:
        UserError: a file is missing or broken, or its contents do not fit the entry.
    """
    key = f"datasets.{name}"
    if source.coco is not None:
        files = {
            split: coco_files.Files(
                expanded(paths.images, f"{key}.coco.{split}.images"),
                expanded(paths.annotations, f"{key}.coco.{split}.annotations"),
            )
            for split, paths in (("train", source.coco.train), ("val", source.coco.val))
        }
        manifest = coco_files.describe(out, name, files, f"{key}.coco", source.masks)
    elif source.arrays is not None:
        manifest = array_files.describe(out, name, source.arrays, f"{key}.arrays", source.labels)
    else:
        assert source.folder is not None
        manifest = folder.describe(out, name, source.folder, f"{key}.folder", source.labels, source.shrink)
    return manifest.model_copy(update={"source": source.identity})
