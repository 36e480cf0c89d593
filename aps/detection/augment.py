"""Large-scale jitter (Simple Copy-Paste, arXiv 2012.07177, section 3): flip, rescale, crop.

Boxes are computed from the cropped masks where there are masks. It uses torch only, and a generator that is passed in.
Engine detectron2 does the same with detectron2's transforms.
"""

from __future__ import annotations

import torch
import torchvision.transforms.v2.functional as T
from torch import Tensor
from torchvision.ops import masks_to_boxes

from aps.detection.annotations import Target
from aps.settings.blocks import DetectionSettings


def jitter(
    image: Tensor, target: Target, settings: DetectionSettings, generator: torch.Generator
) -> tuple[Tensor, Target]:
    """Augment one training sample.

    The image is scaled so that its longer side is `jitter_scale` times S, the setting `image_size`; then a random window
    of at most SxS is kept. Smaller images are padded later, with their batch. Instances without a pixel are dropped.

    Args:
        image: uint8 (3, H, W).

    Returns:
        uint8 (3, h, w) with h, w <= S, and its instances.
    """
    flip, scale, down, right = torch.rand(4, generator=generator).tolist()
    masks, boxes = target.masks, target.boxes
    H, W = image.shape[-2:]
    if flip < settings.flip:
        image = T.horizontal_flip(image)
        masks = None if masks is None else T.horizontal_flip(masks)
        boxes = torch.stack([W - boxes[:, 2], boxes[:, 1], W - boxes[:, 0], boxes[:, 3]], dim=1)
    low, high = settings.jitter_scale
    size = scaled_size(H, W, (low + scale * (high - low)) * settings.image_size)
    if size != [H, W]:
        image = T.resize(image, size, antialias=True)
        if masks is not None:  # NEAREST would shift them by half a pixel
            masks = T.resize(masks, size, interpolation=T.InterpolationMode.NEAREST_EXACT)
        boxes = boxes * torch.tensor([size[1] / W, size[0] / H] * 2)
    height, width = (min(side, settings.image_size) for side in size)
    top, left = round(down * (size[0] - height)), round(right * (size[1] - width))
    image = T.crop(image, top, left, height, width)
    if masks is not None:
        masks = T.crop(masks, top, left, height, width)
        kept = masks.flatten(1).any(dim=1).bool()
        return image, Target(mask_boxes(masks[kept]), target.labels[kept], masks[kept])
    boxes = boxes - torch.tensor([left, top] * 2)
    boxes = torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], dim=2).flatten(1)
    kept = (boxes[:, 2:] - boxes[:, :2] >= 1).all(dim=1)
    return image, Target(boxes[kept], target.labels[kept], None)


def scaled_size(height: int, width: int, longer: float) -> list[int]:
    """[height, width] with a longer side of `longer` pixels, the aspect ratio kept."""
    factor = longer / max(height, width)
    return [max(1, round(height * factor)), max(1, round(width * factor))]


def mask_boxes(masks: Tensor) -> Tensor:
    """masks: (K, H, W), none empty -> (K, 4): left, top, right, bottom; right and bottom are outside the mask."""
    if not len(masks):
        return torch.zeros(0, 4)
    return masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])
