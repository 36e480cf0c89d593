"""Batched views against torchvision's operators, image by image, and crops against its RandomResizedCrop."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode, functional

from aps import views
from aps.settings.blocks import ViewSettings
from aps.training.order import collated
from aps.views import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    SOLARIZE,
    View,
    ViewParameters,
    apply_crops,
    apply_view,
    cut,
    cut_crops,
    draw_boxes,
    draw_parameters,
)

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
NONE = {"color_jitter_prob": 0.0, "grayscale": 0.0, "flip": 0.0}  # crops alone


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two(size: int, settings: ViewSettings) -> tuple[View, View]:
    return View(size, settings, 1), View(size, settings, 2)


def pictures(batch: int, height: int, width: int) -> Tensor:
    """Noise, gray, saturated, flat, black and white images, and photographs that scikit-learn ships."""
    from sklearn.datasets import load_sample_image

    images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator(1))
    images[0] = images[0, :1]  # gray: no hue
    images[1] = (images[1] > 127) * 255  # primary colours, black and white: sectors' borders
    images[2], images[3], images[4] = 0, 255, torch.tensor([200, 30, 30])[:, None, None]
    for i, name in zip(range(5, 9), ["china.jpg", "flower.jpg"] * 2, strict=True):
        photograph = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)
        images[i] = functional.resize(photograph[:, 40 * i - 200 :], [height, width])
    return images


def torchvision_view(image: Tensor, p: ViewParameters, i: int, size: int) -> Tensor:
    """One image through torchvision's functional operators on float tensors."""
    top, left, height, width = p.boxes[i].tolist()
    x = functional.resized_crop(image.float() / 255, top, left, height, width, [size, size], antialias=True)
    return torchvision_colors(functional.horizontal_flip(x) if p.flips[i] else x, p, i)


def torchvision_colors(x: Tensor, p: ViewParameters, i: int) -> Tensor:
    adjust = {
        BRIGHTNESS: functional.adjust_brightness,
        CONTRAST: functional.adjust_contrast,
        SATURATION: functional.adjust_saturation,
        HUE: functional.adjust_hue,
    }
    if p.jitter[i]:
        for operation in p.order[i].tolist():
            x = adjust[operation](x, p.factors[i, operation].item())
    if p.gray[i]:
        x = functional.rgb_to_grayscale(x, 3)
    if p.sigma[i] > 0:
        taps = 2 * (x.shape[2] // 20) + 1
        x = functional.gaussian_blur(x, [taps, taps], [p.sigma[i].item()] * 2)
    if p.solarize[i]:
        x = functional.solarize(x, SOLARIZE)
    return functional.normalize(x, MEAN, STD)


def assert_same(ours: Tensor, reference: Tensor, p: ViewParameters) -> None:
    """To 1e-5 of the [0, 1] range; where solarize flips at its threshold, rounding may put a pixel on either side."""
    difference = (ours - reference).abs() * torch.tensor(STD)[:, None, None]
    at_threshold = (
        (reference * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) - 0.5
    ).abs() < 0.01
    difference[p.solarize[:, None, None, None] & at_threshold] = 0
    assert difference.max() < 1e-5


# --------------------------------------------------------------------------------------------------
# Against torchvision, image by image


ONE_THING = {
    "crop": NONE,
    "crop and flip": {**NONE, "flip": 1.0},
    "brightness": {**NONE, "color_jitter_prob": 1.0, "color_jitter": (0.8, 0.0, 0.0, 0.0)},
    "contrast": {**NONE, "color_jitter_prob": 1.0, "color_jitter": (0.0, 0.8, 0.0, 0.0)},
    "saturation": {**NONE, "color_jitter_prob": 1.0, "color_jitter": (0.0, 0.0, 1.5, 0.0)},
    "hue": {**NONE, "color_jitter_prob": 1.0, "color_jitter": (0.0, 0.0, 0.0, 0.5)},
    "all four, in any order": {**NONE, "color_jitter_prob": 1.0, "color_jitter": (0.4, 0.4, 0.4, 0.1)},
    "grayscale": {**NONE, "grayscale": 0.5},
    "blur": {**NONE, "blur": (0.5, 1.0)},
    "solarize": {**NONE, "solarize": (0.5, 1.0)},
    "CIFAR": {},
    "MoCo v3": {"crop_scale": (0.08, 1.0), "color_jitter": (0.4, 0.4, 0.2, 0.1), "blur": (1.0, 0.1), "solarize": (0.0, 0.2)},
}  # fmt: skip


@pytest.mark.parametrize("what", ONE_THING)
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (45, 70, 48), (8, 8, 16)])
def test_a_view_equals_torchvisions_image_by_image(what, height, width, size):
    images, drawing = pictures(48, height, width), generator(2)
    for view in (1, 2):
        p = draw_parameters(view, 48, height, width, ViewSettings(**ONE_THING[what]), drawing)
        ours = apply_view(images, p, size, MEAN, STD)
        assert ours.shape == (48, 3, size, size) and ours.dtype == torch.float32
        assert_same(ours, torch.stack([torchvision_view(images[i], p, i, size) for i in range(48)]), p)


def test_every_order_of_the_four_colour_operations_equals_torchvisions():
    orders = torch.tensor(list(permutations(range(4))))
    images = pictures(24, 32, 32)
    p = draw_parameters(1, 24, 32, 32, ViewSettings(color_jitter_prob=1.0), generator(3))._replace(order=orders)
    reference = torch.stack([torchvision_view(images[i], p, i, 32) for i in range(24)])
    assert_same(apply_view(images, p, 32, MEAN, STD), reference, p)
    other = p._replace(order=orders.flip(0))  # the order matters: this test would notice a wrong one
    assert ((apply_view(images, other, 32, MEAN, STD) - reference).abs().flatten(1).amax(1) > 1e-2).sum() > 12


def test_large_sources_are_antialiased_as_torchvision_does():
    images = pictures(12, 300, 411)
    p = draw_parameters(1, 12, 300, 411, ViewSettings(crop_scale=(0.9, 1.0), **NONE), generator(4))
    reference = torch.stack([torchvision_view(images[i], p, i, 32) for i in range(12)])
    assert_same(apply_view(images, p, 32, MEAN, STD), reference, p)


def test_a_grayscale_datasets_shared_channels_work():
    one = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8, generator=generator(5))
    p = draw_parameters(1, 16, 8, 8, ViewSettings(), generator(6))
    shared = apply_view(one.expand(-1, 3, -1, -1), p, 16, MEAN, STD)
    assert torch.equal(shared, apply_view(one.repeat(1, 3, 1, 1), p, 16, MEAN, STD))


def test_the_sources_are_left_as_they_were():
    images = pictures(16, 32, 32)
    before = images.clone()
    apply_view(images, draw_parameters(1, 16, 32, 32, ViewSettings(), generator()), 32, MEAN, STD)
    apply_crops(images, draw_parameters(1, 16, 32, 32, ViewSettings(), generator()), MEAN, STD)
    assert torch.equal(images, before)


def test_boxes_and_flips_say_where_a_views_pixels_come_from():
    """Sources whose colours say where a pixel is, read back from the view."""
    height, width, size = 40, 60, 64
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    where = torch.stack([4 * y, 4 * x, 0 * x]).to(torch.uint8).expand(32, -1, -1, -1)
    p = draw_parameters(1, 32, height, width, ViewSettings(**{**NONE, "flip": 0.5}), generator(7))
    view = apply_view(where, p, size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)) * 255 / 4
    boxes, flips = p.geometry()
    top, left, tall, wide = boxes[:, :, None].unbind(1)
    middle = (torch.arange(size) + 0.5) / size
    rows = top + middle * tall - 0.5
    columns = left + torch.where(flips[:, None], 1 - middle, middle) * wide - 0.5
    inner = slice(size // 8, -size // 8)  # at the crop's border interpolation stops at its last pixel
    assert (view[:, 0] - rows[:, :, None])[:, inner].abs().max() < 0.51
    assert (view[:, 1] - columns[:, None, :])[:, :, inner].abs().max() < 0.51
    assert flips.any() and not flips.all()


# --------------------------------------------------------------------------------------------------
# Distributions


def torchvision_boxes(height: int, width: int, settings: ViewSettings, count: int) -> np.ndarray:
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    draw = RandomResizedCrop.get_params
    return np.array([draw(image, list(settings.crop_scale), list(settings.crop_ratio)) for _ in range(count)])


def our_boxes(height: int, width: int, settings: ViewSettings, count: int) -> np.ndarray:
    return draw_boxes(torch.full((count,), height), torch.full((count,), width), settings, generator(8)).numpy()


def two_sample(a: np.ndarray, b: np.ndarray) -> float:
    """p-value of a chi-square test that two samples of whole numbers have one distribution; rare values share a class."""
    values, place = np.unique(np.concatenate([a, b]), return_inverse=True)
    table = np.stack([np.bincount(part, minlength=len(values)) for part in (place[: len(a)], place[len(a) :])])
    few = table.sum(0) < 20
    table = np.column_stack([table[:, ~few], table[:, few].sum(1)])
    return float(stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue)


# in 60x20 and 24x80 many tries do not fit
SOURCES = [(32, 32), (60, 20), (24, 80), (224, 300)]


@pytest.mark.parametrize(("height", "width"), SOURCES)
def test_crop_boxes_have_the_distribution_of_torchvisions(height, width):
    settings, count = ViewSettings(), 6000
    ours, theirs = our_boxes(height, width, settings, count), torchvision_boxes(height, width, settings, count)
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    area, aspect = (lambda b: b[:, 2] * b[:, 3]), (lambda b: b[:, 2] / b[:, 3])
    assert stats.ks_2samp(area(ours), area(theirs)).pvalue > 1e-3
    assert stats.ks_2samp(aspect(ours), aspect(theirs)).pvalue > 1e-3
    room = lambda b: b[b[:, 2] < height][:, 0] / (height - b[b[:, 2] < height][:, 2])  # noqa: E731
    assert stats.ks_2samp(room(ours), room(theirs)).pvalue > 1e-3
    if height == 32:  # jointly: each size a class, and each corner
        assert two_sample(ours[:, 2] * 100 + ours[:, 3], theirs[:, 2] * 100 + theirs[:, 3]) > 1e-3
        assert two_sample(ours[:, 0] * 100 + ours[:, 1], theirs[:, 0] * 100 + theirs[:, 1]) > 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_scale": (0.08, 1.0)},
        {"crop_scale": (0.15, 0.9)},
        {"crop_ratio": (0.8, 4 / 3)},
        {"crop_ratio": (0.75, 1.25)},
    ],
)
def test_other_crop_settings_would_be_noticed(wrong):
    theirs = torchvision_boxes(32, 32, ViewSettings(), 6000)
    ours = our_boxes(32, 32, ViewSettings(**wrong), 6000)
    assert two_sample(ours[:, 2] * 100 + ours[:, 3], theirs[:, 2] * 100 + theirs[:, 3]) < 1e-6


def test_sources_that_no_random_box_fits_get_torchvisions_centred_box():
    settings = ViewSettings(crop_scale=(0.9, 1.0))
    for height, width in [(10, 100), (100, 10), (3, 200), (333, 7), (100, 101)]:
        if height == 100 and width == 101:
            settings = ViewSettings(crop_scale=(0.9, 1.0), crop_ratio=(3.0, 4.0))  # every box too wide
        theirs = torchvision_boxes(height, width, settings, 20)
        assert (theirs == theirs[0]).all()
        assert np.array_equal(our_boxes(height, width, settings, 20), theirs)


def test_a_box_has_a_pixel_at_least_whatever_the_aspect_ratio():
    """torchvision's centred box has none there, and ends in an error."""
    for ratio in (0.01, 100.0):
        boxes = our_boxes(8, 8, ViewSettings(crop_ratio=(ratio, ratio)), 20)
        assert (boxes[:, 2:] >= 1).all() and (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 8).all()


def test_the_share_of_centred_boxes_is_torchvisions():
    settings, height, width = ViewSettings(), 14, 64
    centred = torchvision_boxes(height, width, ViewSettings(crop_scale=(1.0, 1.0)), 1)[0]
    ours, theirs = (
        (boxes(height, width, settings, 6000) == centred).all(1) for boxes in (our_boxes, torchvision_boxes)
    )
    assert 0.05 < theirs.mean() < 0.95
    assert stats.chi2_contingency([[o.sum(), (~o).sum()] for o in (ours, theirs)]).pvalue > 1e-3


def test_boxes_of_sources_of_different_sizes_lie_inside_each():
    heights = torch.randint(1, 500, (4000,), generator=generator(9))
    widths = torch.randint(1, 500, (4000,), generator=generator(10))
    top, left, height, width = draw_boxes(heights, widths, ViewSettings(), generator(11)).T
    assert (height >= 1).all() and (width >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + height <= heights).all() and (left + width <= widths).all()


def test_switches_factors_and_orders_have_their_distributions():
    p = draw_parameters(1, 24000, 32, 32, ViewSettings(blur=(0.3, 0.0), solarize=(0.1, 0.0)), generator(12))
    for drawn, probability in [
        (p.flips, 0.5),
        (p.jitter, 0.8),
        (p.gray, 0.2),
        (p.sigma > 0, 0.3),
        (p.solarize, 0.1),
        (p.flips & p.gray & p.jitter, 0.08),  # independent of one another
    ]:
        assert stats.binomtest(int(drawn.sum()), 24000, probability).pvalue > 1e-3
    for operation, strength in enumerate((0.4, 0.4, 0.4, 0.1)):
        low = -strength if operation == HUE else 1 - strength
        assert stats.kstest(p.factors[:, operation], stats.uniform(low, 2 * strength).cdf).pvalue > 1e-3
    assert stats.kstest(p.sigma[p.sigma > 0], stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    counts = torch.bincount((p.order * torch.tensor([64, 16, 4, 1])).sum(1))
    assert (counts > 0).sum() == 24
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-3


def test_factors_never_fall_below_zero():
    p = draw_parameters(1, 2000, 8, 8, ViewSettings(color_jitter=(1.8, 1.8, 1.8, 0.5)), generator(13))
    assert p.factors[:, :HUE].min() >= 0 and p.factors[:, :HUE].max() > 2
    assert p.factors[:, HUE].abs().max() <= 0.5


def test_blur_and_solarize_have_a_probability_for_each_view():
    settings = ViewSettings(blur=(1.0, 0.0), solarize=(0.0, 1.0))
    one, two = (draw_parameters(v, 50, 32, 32, settings, generator()) for v in (1, 2))
    assert (one.sigma > 0).all() and not one.solarize.any()
    assert not (two.sigma > 0).any() and two.solarize.all()


def test_probabilities_of_zero_cost_nothing(monkeypatch):
    def never(*_args, **_more):
        raise AssertionError("not asked for")

    for name in ("blur_matrix", "turn_hue", "_blend"):
        monkeypatch.setattr(views, name, never)
    p = draw_parameters(1, 16, 32, 32, ViewSettings(**NONE), generator())
    apply_view(pictures(16, 32, 32), p, 32, MEAN, STD)
    p = draw_parameters(1, 16, 32, 32, ViewSettings(color_jitter=(0.0, 0.0, 0.0, 0.0)), generator())
    apply_view(pictures(16, 32, 32), p, 32, MEAN, STD)


def test_no_hue_strength_costs_no_hue(monkeypatch):
    monkeypatch.setattr(views, "turn_hue", None)
    settings = ViewSettings(color_jitter=(0.4, 0.4, 0.4, 0.0))
    apply_view(pictures(16, 32, 32), draw_parameters(1, 16, 32, 32, settings, generator()), 32, MEAN, STD)


# --------------------------------------------------------------------------------------------------
# Processes, workers, devices


def test_any_number_of_processes_makes_the_views_of_one():
    images = pictures(24, 32, 32)
    p = draw_parameters(1, 24, 32, 32, ViewSettings(blur=(0.5, 0.5), solarize=(0.5, 0.5)), generator(14))
    whole = apply_view(images, p, 32, MEAN, STD)
    parts = [apply_view(images[own], p.rows(own), 32, MEAN, STD) for own in (slice(0, 10), slice(10, 24))]
    assert (torch.cat(parts) - whole).abs().max() < 1e-5


def test_a_workers_crops_depend_on_seed_epoch_and_image_only():
    image = pictures(9, 90, 120)[5]
    crops, boxes = cut_crops(image, two(32, ViewSettings()), (0, 3, 17))
    torch.manual_seed(99)
    again, same = cut_crops(image, two(32, ViewSettings()), (0, 3, 17))
    crops = torch.stack(crops)
    assert torch.equal(crops, torch.stack(again)) and torch.equal(boxes, same)
    assert crops.shape == (2, 3, 32, 32) and crops.dtype == torch.uint8 and boxes.shape == (2, 4)
    others = [cut_crops(image, two(32, ViewSettings()), seed)[1] for seed in [(1, 3, 17), (0, 4, 17), (0, 3, 18)]]
    everything = torch.stack([boxes, *others]).flatten(0, 1)
    assert len(everything.unique(dim=0)) == 8  # both views of all four differ


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_cut_is_torchvisions_resized_crop_however_pixels_lie(interpolation: str):
    mode = InterpolationMode(interpolation)
    planes = pictures(9, 70, 90)[5]
    decoded = planes.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as decoders leave them
    gray = planes[:1].expand(3, -1, -1)
    for image in (planes, decoded, gray):
        for box in ([0, 0, 70, 90], [3, 5, 40, 60], [10, 20, 20, 17], [69, 89, 1, 1]):
            expected = functional.resized_crop(image, *box, [32, 32], mode, antialias=True)
            assert torch.equal(cut(image, box, 32, mode), expected)


def test_workers_batches_are_those_of_default_collate():
    samples = [cut_crops(image, two(32, ViewSettings()), (0, 0, i)) for i, image in enumerate(pictures(9, 64, 80))]
    (crops, boxes), (expected, same) = collated(samples), default_collate(samples)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip([*crops, boxes], [*expected, same], strict=True))
    assert crops[0].shape == (9, 3, 32, 32) and crops[0].is_contiguous(memory_format=torch.channels_last)
    plain = [x.contiguous() for x in pictures(9, 9, 12)]  # a single tensor each, channel by channel
    assert torch.equal(collated(plain), default_collate(plain))


def test_workers_crop_boxes_have_the_distribution_of_torchvisions():
    image = torch.zeros(3, 20, 32, dtype=torch.uint8)
    boxes = torch.stack([cut_crops(image, two(4, ViewSettings()), (0, 0, index))[1] for index in range(1200)]).numpy()
    theirs = torchvision_boxes(20, 32, ViewSettings(), 4000)
    for view in (0, 1):
        for column in range(4):
            assert two_sample(boxes[:, view, column], theirs[:, column]) > 1e-3
    assert abs(np.corrcoef(boxes[:, 0, 2], boxes[:, 1, 2])[0, 1]) < 0.08  # views are independent


def test_crops_cut_by_workers_become_the_views_of_the_batched_path():
    """Up to the rounding of crops to whole gray levels, of each axis in turn."""
    images, settings = pictures(24, 64, 80), ViewSettings(blur=(0.5, 0.5))
    made = [cut_crops(image, two(32, settings), (0, 0, i)) for i, image in enumerate(images)]
    crops, boxes = torch.stack([torch.stack(c) for c, _ in made]), torch.stack([b for _, b in made])
    for view in (1, 2):
        p = draw_parameters(view, 24, 32, 32, settings, generator(view))._replace(boxes=boxes[:, view - 1])
        flipped = [functional.horizontal_flip(c) if f else c for c, f in zip(crops[:, view - 1], p.flips, strict=True)]
        reference = torch.stack([torchvision_colors(x.float() / 255, p, i) for i, x in enumerate(flipped)])
        from_files = apply_crops(crops[:, view - 1], p, MEAN, STD)
        assert_same(from_files, reference, p)
        quiet = p._replace(jitter=torch.zeros(24, dtype=torch.bool))  # colours amplify the rounding
        rounded = apply_crops(crops[:, view - 1], quiet, MEAN, STD) - apply_view(images, quiet, 32, MEAN, STD)
        assert (rounded * torch.tensor(STD)[:, None, None]).abs().max() < 1.01 / 255


@pytest.mark.parametrize("settings", [ViewSettings(), ViewSettings(blur=(0.5, 0.5), solarize=(0.5, 0.5))])
def test_views_never_ask_the_device_for_a_value(settings):
    """The meta device has no values to give: anything that would synchronize raises there."""
    p = draw_parameters(1, 16, 32, 32, settings, generator())
    images = torch.empty(16, 3, 32, 32, dtype=torch.uint8, device="meta")
    assert apply_view(images, p, 32, MEAN, STD).is_meta
    assert apply_crops(images, p, MEAN, STD).is_meta
    assert p.geometry("meta").boxes.is_meta


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_cpus_views_without_synchronizing():
    images, settings = pictures(64, 48, 64), ViewSettings(blur=(0.5, 0.5))
    p = draw_parameters(1, 64, 48, 64, settings, generator())
    on_gpu = images.cuda()
    torch.set_float32_matmul_precision("high")  # as training has it
    try:
        torch.cuda.set_sync_debug_mode("error")
        view = apply_view(on_gpu, p, 32, MEAN, STD)
        p.geometry("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_float32_matmul_precision("highest")
    assert (view.cpu() - apply_view(images, p, 32, MEAN, STD)).abs().max() < 1e-4
