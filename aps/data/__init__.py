"""Datasets by name. A new dataset is one file here and one row of REGISTRY.

This file imports nothing heavy: planning reads the registry. `open_dataset` imports the rest.
"""

from typing import Literal, NamedTuple


class Entry(NamedTuple):
    module: str  # a module of aps.data
    kind: Literal["classification", "detection"]


REGISTRY = {
    "digits": Entry("digits", "classification"),
    "fashion_mnist": Entry("fashion_mnist", "classification"),
    "cifar10": Entry("cifar", "classification"),
    "cifar100": Entry("cifar", "classification"),
    "imagenet1k": Entry("imagenet", "classification"),
    "folder": Entry("folder", "classification"),
    "digits_coco": Entry("composites", "detection"),
    "fashion_coco": Entry("composites", "detection"),
    "coco2017": Entry("coco", "detection"),
}
