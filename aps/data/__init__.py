"""Datasets by name. A new dataset is one file here and one row of `aps.registry` (docs/datasets.md shows one).

The contract of a dataset's module is one function:

    def prepare(folder: Path, source: SourceSettings, name: str) -> Manifest

It gets the images (from `source.path`, else by download where `source.download` allows one), verifies them, writes what
loaders need under `folder` and returns the manifest, which `aps.data.prepare` writes last: a manifest that exists is a
prepared dataset. It must be safe to kill and call again: the second call finds the work that is already finished. Helpers:
`arrays.store` for small images held in memory, `trees.describe` for folders of image files, `fetch` for archives.

Users' datasets, which a study's block `datasets` names, go through `user_datasets`: trees of images (`folder`), .npz
files (`array_files`), COCO files (`coco_files`).
"""

NEED_A_PATH = ("folder", "imagenet1k")  # datasets that nobody can download
