"""Masks of the torchvision engine: cut for training, pasted for prediction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aps.detection.engines.torchvision import mask_targets, paste


def ovals() -> tuple[Tensor, Tensor]:
    """Six masks (6, 40, 48) of 16 to 28 pixels and a box around each, between the pixels, two beyond the image."""
    rows, columns = torch.arange(40) + 0.5, torch.arange(48) + 0.5
    generator = torch.Generator().manual_seed(0)
    masks, boxes = [], []
    for number in range(6):
        a, b = (torch.rand(2, generator=generator) * 6 + 8).tolist()
        cy, cx = (torch.rand(2, generator=generator) * 8 + 16).tolist() if number < 4 else (34.0, 42.0)
        masks.append(((rows[:, None] - cy) / a) ** 2 + ((columns[None] - cx) / b) ** 2 <= 1)
        boxes.append((cx - b - 0.3, cy - a - 0.6, min(cx + b + 0.7, 48.0), min(cy + a + 0.2, 40.0)))
    return torch.stack(masks), torch.tensor(boxes)


def test_a_mask_that_was_cut_and_pasted_is_the_mask():
    masks, boxes = ovals()
    found = paste(mask_targets(masks, boxes, torch.arange(6), 28)[:, None], boxes, 40, 48)
    assert found.dtype == torch.bool and found.shape == masks.shape
    assert ((found ^ masks).sum((1, 2)) <= 3).all()  # a shift of half a pixel makes a dozen and more differ
    shifted = paste(mask_targets(masks, boxes, torch.arange(6), 28)[:, None], boxes + 0.5, 40, 48)
    assert ((shifted ^ masks).sum((1, 2)) > 10).all()


def test_each_box_gets_the_mask_of_its_own_instance():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[1, :, :4] = True
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 8.0], [3.0, 0.0, 5.0, 2.0]])
    found = mask_targets(masks, boxes, torch.tensor([1, 0, 1]), 4)
    assert torch.equal(found[0], torch.tensor([1.0, 1, 0, 0]).expand(4, 4)) and not found[1].any()
    assert torch.equal(found[2], found[0])


def test_nothing_to_cut_or_paste_is_no_mask():
    no_boxes, no_index = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    for instances in (0, 2):
        assert mask_targets(torch.ones(instances, 8, 8), no_boxes, no_index, 4).shape == (0, 4, 4)
    assert paste(torch.zeros(0, 1, 4, 4), no_boxes, 8, 6).shape == (0, 8, 6)


def test_a_box_a_hair_beyond_the_image_is_pasted_as_far_as_it_goes():
    found = paste(torch.ones(1, 1, 4, 4), torch.tensor([[-0.00001, 2.0, 6.00001, 8.00001]]), 8, 6)
    assert torch.equal(found[0], (torch.arange(8) >= 2)[:, None].expand(8, 6))


@pytest.mark.detectron2
def test_both_are_detectron2s():
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2.layers import paste_masks_in_image
    from detectron2.structures import BitMasks

    masks, boxes = ovals()
    boxes = torch.cat([boxes, boxes + torch.tensor([1.3, -2.1, -3.4, 0.9])])
    index = torch.arange(6).repeat(2)
    cut = mask_targets(masks, boxes, index, 28)
    assert torch.equal(cut.bool(), BitMasks(masks[index]).crop_and_resize(boxes, 28))
    crops = torch.rand(12, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    assert torch.equal(paste(crops, boxes, 40, 48), paste_masks_in_image(crops[:, 0], boxes, (40, 48)))
