"""Small copies of the published datasets, in exactly the publishers' formats, for the same code to run on."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import torch
from torchvision.io import encode_jpeg, encode_png


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def image(seed: int, height: int = 12, width: int = 16) -> torch.Tensor:
    """uint8 (3, H, W), smooth, so that JPEG keeps it."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((1, 3, 2, 2), generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].round().to(torch.uint8)


def jpeg(seed: int, height: int = 12, width: int = 16) -> bytes:
    return encode_jpeg(image(seed, height, width), quality=95).numpy().tobytes()


def png(pixels: torch.Tensor) -> bytes:
    return encode_png(pixels).numpy().tobytes()


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


# --------------------------------------------------------------------------------------------------
# IDX


def idx(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(struct.pack(">I", size) for size in values.shape)
    return header + values.astype(np.uint8).tobytes()


def fashion_mnist(folder: Path, train: int, test: int, zip_it: bool = True) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The four files; returns split: (images (M, 28, 28), labels (M,))."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for split, prefix, count in (("train", "train", train), ("test", "t10k", test)):
        images = generator.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, content in (
            (f"{prefix}-images-idx3-ubyte", idx(images)),
            (f"{prefix}-labels-idx1-ubyte", idx(labels)),
        ):
            file = folder / (f"{name}.gz" if zip_it else name)
            file.write_bytes(gzip.compress(content) if zip_it else content)
        made[split] = (images, labels)
    return made


# --------------------------------------------------------------------------------------------------
# CIFAR


class _Python2Pickler(pickle._Pickler):
    """Writes what the publisher's Python 2 wrote: byte strings as its str, numpy's names of that time."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_str2(self, value: bytes) -> None:
        if len(value) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(value)]) + value)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_str2

    def save_text(self, value: str) -> None:
        self.save_str2(value.encode("latin1"))

    dispatch[str] = save_text

    def save_global(self, value: Any, name: str | None = None) -> None:
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{value.__name__}\n".encode())
        self.memoize(value)

    dispatch[type] = save_global
    dispatch[type(np.zeros(0).__reduce__()[0])] = save_global


def python2_pickle(value: Any) -> bytes:
    """Protocol 2, as cPickle wrote the published batches."""
    out = io.BytesIO()
    _Python2Pickler(out, protocol=2).dump(value)
    return out.getvalue()


def cifar_batches(name: str, per_batch: int) -> tuple[dict[str, bytes], dict[str, tuple[np.ndarray, list[int]]]]:
    """The files of cifar10 or cifar100, and split: (images (M, 3, 32, 32), labels)."""
    generator = np.random.default_rng(1)
    ten = name == "cifar10"
    train = [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]
    classes = 10 if ten else 100
    files: dict[str, bytes] = {}
    made: dict[str, list[Any]] = {"train": [], "test": []}
    for batch in [*train, "test_batch" if ten else "test"]:
        images = generator.integers(0, 256, (per_batch, 3072)).astype(np.uint8)
        labels = [int(label) for label in generator.integers(0, classes, per_batch)]
        content: dict[bytes, Any] = {
            b"batch_label": b"training batch",
            b"labels" if ten else b"fine_labels": labels,
            b"data": images,
            b"filenames": [f"image_{i}.png".encode() for i in range(per_batch)],
        }
        if not ten:
            content[b"coarse_labels"] = [label // 5 for label in labels]
        files[batch] = python2_pickle(content)
        made["train" if batch in train else "test"].append((images.reshape(-1, 3, 32, 32), labels))
    names = [f"class {i}".encode() for i in range(classes)]
    meta = {b"label_names" if ten else b"fine_label_names": names, b"num_vis": 3072}
    files["batches.meta" if ten else "meta"] = python2_pickle(meta)
    joined = {
        split: (np.concatenate([images for images, _ in batches]), [label for _, labels in batches for label in labels])
        for split, batches in made.items()
    }
    return files, joined


# --------------------------------------------------------------------------------------------------
# ImageNet


def wnids(classes: int) -> list[str]:
    return [f"n{10_000_000 + 37 * i:08d}" for i in range(classes)]


def devkit(ids: list[str], truth: list[int]) -> bytes:
    """meta.mat with one synset more than there are classes (their parent), and the validation images' numbers."""
    fields = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children")]
    synsets = np.empty((len(ids) + 1, 1), dtype=fields)
    for i, wnid in enumerate(ids):
        synsets[i, 0] = (i + 1, wnid, f"thing {i}, sort of", "a thing", 0, np.zeros((1, 0)))
    synsets[-1, 0] = (len(ids) + 1, "n99999999", "parent", "of all", len(ids), np.arange(1, len(ids) + 1))
    mat = io.BytesIO()
    scipy.io.savemat(mat, {"synsets": synsets})
    base = "ILSVRC2012_devkit_t12"
    return tar(
        {
            f"{base}/readme.txt": b"development kit",
            f"{base}/data/meta.mat": mat.getvalue(),
            f"{base}/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{t}\n" for t in truth).encode(),
        },
        "w:gz",
    )


def imagenet(folder: Path, classes: int, train: int, val: int) -> dict[str, str]:
    """The three archives, with `train` and `val` images a class; returns archive: md5.

    Class numbers (ILSVRC2012_ID) run against the order of the WordNet IDs, as they do in the real one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = wnids(classes)
    nested = {}
    for c, wnid in enumerate(ids):
        nested[f"{wnid}.tar"] = tar({f"{wnid}_{i + 1}.JPEG": jpeg(1000 * c + i, 10 + i, 12) for i in range(train)})
    truth = [c % classes + 1 for c in range(classes * val)]
    validation = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(500_000 + i) for i in range(classes * val)}
    archives = {
        "ILSVRC2012_img_train.tar": tar(nested),
        "ILSVRC2012_img_val.tar": tar(validation),
        "ILSVRC2012_devkit_t12.tar.gz": devkit(ids[::-1], truth),
    }
    for name, content in archives.items():
        (folder / name).write_bytes(content)
    return {name: md5(content) for name, content in archives.items()}


# --------------------------------------------------------------------------------------------------
# COCO


def coco_annotations(names: list[str], instances: int, classes: int) -> dict[str, Any]:
    images = [
        {"id": 100 + i, "file_name": name, "height": 12, "width": 16, "license": 1} for i, name in enumerate(names)
    ]
    annotations = [
        {
            "id": 9000 + i,
            "image_id": 100 + i % len(names),
            "category_id": 3 * (i % classes) + 1,
            "bbox": [1.0, 2.0, 5.0, 4.0],
            "area": 20.0,
            "iscrowd": 0,
            "segmentation": [[1.0, 2.0, 6.0, 2.0, 6.0, 6.0, 1.0, 6.0]],
        }
        for i in range(instances)
    ]
    # real category ids have gaps, too
    categories = [{"id": 3 * c + 1, "name": f"thing {c}", "supercategory": "things"} for c in range(classes)]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}


def coco(folder: Path, train: int, val: int, instances: int, classes: int) -> dict[str, str]:
    """The three zips, `instances` an image; returns zip: md5."""
    folder.mkdir(parents=True, exist_ok=True)
    annotations = {"annotations/captions_train2017.json": b"{}"}
    archives = {}
    for split, count in (("train", train), ("val", val)):
        names = [f"{i:012d}.jpg" for i in range(count)]
        archives[f"{split}2017.zip"] = zipped(
            {f"{split}2017/": b""} | {f"{split}2017/{n}": jpeg(i) for i, n in enumerate(names)}
        )
        content = coco_annotations(names, instances * count, classes)
        annotations[f"annotations/instances_{split}2017.json"] = json.dumps(content).encode()
    archives["annotations_trainval2017.zip"] = zipped(annotations)
    for name, content in archives.items():
        (folder / name).write_bytes(content)
    return {name: md5(content) for name, content in archives.items()}


# --------------------------------------------------------------------------------------------------
# ImageFolder


def tree(root: Path, classes: list[str], images: int, start: int = 0) -> None:
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(images):
            (root / name / f"{i}.png").write_bytes(png(image(start + 100 * c + i)))
