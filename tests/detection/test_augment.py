"""Large-scale jitter."""

from __future__ import annotations

import torch

from aps.detection.annotations import Target
from aps.detection.augment import jitter
from aps.settings.blocks import DetectionSettings


def square() -> tuple[torch.Tensor, Target]:
    """A 40x60 image with a bright rectangle that is its one instance, and a speck in its first corner."""
    masks = torch.zeros(2, 40, 60, dtype=torch.uint8)
    masks[0, 10:30, 20:50] = 1
    masks[1, 0, 0] = 1
    image = (masks[0] * 200).expand(3, -1, -1).contiguous()
    return image, Target(torch.tensor([[20.0, 10, 50, 30], [0, 0, 1, 1]]), torch.tensor([4, 2]), masks)


def drawn(seed: int, **settings: object) -> tuple[torch.Tensor, Target]:
    chosen = DetectionSettings(image_size=60).model_copy(update=settings)
    return jitter(*square(), chosen, torch.Generator().manual_seed(seed))


def test_without_jitter_and_flip_nothing_changes():
    image, target = square()
    found, kept = drawn(0, jitter_scale=(1.0, 1.0), flip=0.0)
    assert torch.equal(found, image) and torch.equal(kept.masks, target.masks) and torch.equal(kept.boxes, target.boxes)


def test_a_flip_mirrors_image_masks_and_boxes():
    image, kept = drawn(0, jitter_scale=(1.0, 1.0), flip=1.0)
    assert torch.equal(image, square()[0].flip(-1))
    assert kept.boxes.tolist() == [[10, 10, 40, 30], [59, 0, 60, 1]]


def test_boxes_follow_masks_and_masks_follow_the_image_through_scale_and_crop():
    sizes = set()
    for seed in range(60):
        image, kept = drawn(seed, jitter_scale=(0.3, 2.0))
        assert max(image.shape[-2:]) <= 60 and kept.masks.shape[1:] == image.shape[1:]
        sizes.add(tuple(image.shape[-2:]))
        for box, mask in zip(kept.boxes, kept.masks, strict=True):
            ys, xs = torch.nonzero(mask, as_tuple=True)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        if 4 in kept.labels:  # the bright rectangle and its mask coincide up to interpolation at the rim
            mask = kept.masks[kept.labels == 4][0].bool()
            assert ((image[0] > 100) ^ mask).sum() <= 2 * (mask.shape[0] + mask.shape[1])
    assert len(sizes) > 20


def test_masks_are_scaled_about_the_same_centre_as_the_image():
    def middle(x: torch.Tensor) -> torch.Tensor:
        weights = x.double() / x.double().sum()
        rows, columns = (torch.arange(side) for side in x.shape)
        return torch.stack([(weights.sum(1) * rows).sum(), (weights.sum(0) * columns).sum()])

    apart = []
    for seed in range(100):
        image, kept = drawn(seed, jitter_scale=(0.5, 1.0), flip=0.5)
        apart.append(middle(kept.masks[kept.labels == 4][0]) - middle(image[0]))
    # In pixels; edges halfway between two, a quarter of the sizes here, all fall the same way.
    assert torch.stack(apart).mean(0).abs().max() < 0.15


def test_what_is_cropped_away_is_no_instance():
    lost = sum(2 not in drawn(seed, jitter_scale=(2.0, 2.0))[1].labels for seed in range(20))
    assert lost >= 15  # the speck in the corner survives a crop of a quarter only by luck


def test_the_generator_decides_alone():
    torch.manual_seed(1)
    a = drawn(5, jitter_scale=(0.3, 2.0))[0]
    torch.manual_seed(2)
    assert torch.equal(a, drawn(5, jitter_scale=(0.3, 2.0))[0])
    assert torch.initial_seed() == 2
