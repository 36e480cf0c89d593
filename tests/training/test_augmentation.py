"""Batched augmentation against timm's and torchvision's on Pillow images: pixel by pixel, and in distribution."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_image
from timm.data import Mixup, auto_augment
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import ColorJitter, functional

from aps.settings.blocks import FinetuneSettings, ViewSettings
from aps.training import augment
from aps.training.augment import BLENDS, MOVES, NONE, OPERATORS, SCALES, TABLES, Draw, Mix, Program
from aps.views import apply_crops, apply_view, crop_resize, draw_parameters

FILL = (124, 116, 104)
COLOUR = torch.tensor(FILL, dtype=torch.float32)
TIMM: dict[str, Callable[..., Image.Image]] = {
    "AutoContrast": auto_augment.auto_contrast,
    "Equalize": auto_augment.equalize,
    "Invert": auto_augment.invert,
    "Posterize": auto_augment.posterize,
    "Solarize": auto_augment.solarize,
    "SolarizeAdd": auto_augment.solarize_add,
    "Brightness": auto_augment.brightness,
    "Contrast": auto_augment.contrast,
    "Color": auto_augment.color,
    "Sharpness": auto_augment.sharpness,
    "Rotate": auto_augment.rotate,
    "ShearX": auto_augment.shear_x,
    "ShearY": auto_augment.shear_y,
    "TranslateX": auto_augment.translate_x_rel,
    "TranslateY": auto_augment.translate_y_rel,
}
WITHOUT_VALUE = ("AutoContrast", "Equalize", "Invert")
WHOLE = ("Posterize", "Solarize", "SolarizeAdd")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(batch: int, side: int) -> Tensor:
    """Noise, photographs, and what operators stumble over: flat, two-valued, gray and nearly flat images."""
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator(1))
    photograph = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
    for i in range(8, min(24, batch)):
        images[i] = functional.resize(photograph[:, 9 * i : 9 * i + 250, 12 * i : 12 * i + 250], [side, side])
    images[0], images[1], images[2] = 0, 255, 77
    images[3] = (images[3] > 127) * 255
    images[4] = images[4][:1]
    images[5] = images[5] // 64 + 100
    images[6, 0] = 5  # one flat channel
    images[7] = images[7] // 128 * 200  # few values: large steps of the histogram
    return images


def by_timm(image: Tensor, name: str, value: float, bicubic: bool) -> Tensor:
    """One operator on one image."""
    arguments: tuple[float, ...] = () if name in WITHOUT_VALUE else (int(value) if name in WHOLE else value,)
    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    found = TIMM[name](functional.to_pil_image(image), *arguments, fillcolor=FILL, resample=resample)
    return functional.pil_to_tensor(found)


def variant(name: str, increasing: bool) -> str:
    """The operator's name in SCALES."""
    for found in (name + "Increasing" * increasing, name, name + "Rel"):
        if found in SCALES:
            return found
    raise AssertionError(name)


def some_values(name: str, count: int, increasing: bool) -> Tensor:
    """What RandAugment gives the operator, over all magnitudes."""
    scale = SCALES[variant(name, increasing)]
    moved = scale.most * torch.linspace(0, 1, count, dtype=torch.float64)
    sign = 1 - 2.0 * torch.randint(0, 2, (count,), generator=generator(2)).double()
    moved = moved.floor() if scale.whole else moved
    return (scale.start + moved * (scale.direction or sign)).clamp(scale.least, scale.greatest)


# --------------------------------------------------------------------------------------------------
# Operators, image by image


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("side", [32, 17])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_gives_the_pixels_of_timms(name: str, side: int, increasing: bool) -> None:
    images = pictures(60, side)
    values = some_values(name, 60, increasing)
    bicubic = torch.arange(60) % 2 == 0
    ours = augment.run_program(
        images, Program(torch.full((1, 60), OPERATORS.index(name)), values[None], bicubic[None]), COLOUR
    )
    reference = torch.stack([by_timm(images[i], name, values[i].item(), bool(bicubic[i])) for i in range(60)])
    difference = (ours.int() - reference.int()).abs()
    if name in MOVES:  # Pillow interpolates in float64 and cuts off: a hair under a whole number is the one below
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.002
        assert torch.equal(ours[:3], reference[:3])  # flat ones
    else:
        assert torch.equal(ours, reference)
    if name != "Posterize" or increasing:  # this test would notice an operator that does nothing
        assert (ours != images).flatten(1).any(1).sum() > 20


def test_shifts_by_whole_pixels_are_exact_and_by_tenths_within_one_level() -> None:
    """A magnitude without noise shifts every image alike, by 14.4 pixels of 32 at 10: fractions that float32 rounds."""
    images = pictures(40, 32)
    for name, value in (("TranslateX", 0.25), ("TranslateY", -0.5), ("TranslateX", 0.45), ("ShearY", -0.3)):
        for bicubic in (False, True):
            program = Program(
                torch.full((1, 40), OPERATORS.index(name)),
                torch.full((1, 40), value).double(),
                torch.full((1, 40), bicubic),
            )
            reference = torch.stack([by_timm(image, name, value, bicubic) for image in images])
            difference = (augment.run_program(images, program, COLOUR).int() - reference.int()).abs()
            assert difference.max() <= (0 if value in (0.25, -0.5) else 1)


@pytest.mark.parametrize("notation", ["rand-m9-mstd0.5-inc1", "rand-m6-n3-p0.9-mstd1"])
def test_a_program_is_its_operators_one_after_another_for_each_image(notation: str) -> None:
    images = pictures(300, 32)
    program = Draw(FinetuneSettings(rand_augment=notation), 32).program(300, generator(3))
    assert (program.operators == NONE).any() and len(program.operators.unique()) == NONE + 1
    ours = augment.run_program(images, program, COLOUR)
    expected = images.clone()
    for operators, values, bicubic in zip(*program, strict=True):
        for i in range(300):
            if operators[i] != NONE:
                expected[i] = by_timm(expected[i], OPERATORS[operators[i]], values[i].item(), bool(bicubic[i]))
    difference = (ours.int() - expected.int()).abs().flatten(1)
    assert torch.equal(ours[(program.operators == NONE).all(0)], images[(program.operators == NONE).all(0)])
    # after a move that is off by one level somewhere, equalizing or solarizing spreads it
    assert (difference.amax(1) == 0).float().mean() > 0.95
    assert (difference > 1).float().mean() < 1e-3


def test_no_layers_of_rand_augment_are_no_colour_jitter_either() -> None:
    draw = Draw(FinetuneSettings(rand_augment="rand-m9-n0"), 32)
    assert draw.program(4, generator()).operators.shape == (0, 4)
    assert torch.equal(augment.run_program(pictures(12, 32), draw.program(12, generator()), COLOUR), pictures(12, 32))


def test_images_do_not_depend_on_their_company() -> None:
    images = pictures(64, 32)
    program = Draw(FinetuneSettings(), 32).program(64, generator(4))
    together = augment.run_program(images, program, COLOUR)
    for rows in (slice(0, 1), slice(10, 30)):
        alone = augment.run_program(images[rows], Program(*(field[:, rows] for field in program)), COLOUR)
        assert torch.equal(alone, together[rows])


def test_the_images_are_left_as_they_were() -> None:
    images = pictures(64, 32)
    before = images.clone()
    augment.run_program(images, Draw(FinetuneSettings(), 32).program(64, generator(5)), COLOUR)
    assert torch.equal(images, before)


def test_colour_jitter_is_torchvisions_on_pillow_images() -> None:
    images = pictures(60, 32)
    program = Draw(FinetuneSettings(rand_augment=None, color_jitter=0.4), 32).program(60, generator(6))
    assert {tuple(column) for column in program.operators.T.tolist()} == {
        tuple(OPERATORS.index(name) for name in names)
        for names in (
            ("Brightness", "Contrast", "Color"), ("Brightness", "Color", "Contrast"), ("Contrast", "Brightness", "Color"),
            ("Contrast", "Color", "Brightness"), ("Color", "Brightness", "Contrast"), ("Color", "Contrast", "Brightness"),
        )
    }  # fmt: skip
    adjust = {"Brightness": "adjust_brightness", "Contrast": "adjust_contrast", "Color": "adjust_saturation"}
    for i in range(60):
        image = functional.to_pil_image(images[i])
        for operator, factor in zip(program.operators[:, i], program.values[:, i], strict=True):
            image = getattr(functional, adjust[OPERATORS[operator]])(image, factor.item())
        one = Program(*(field[:, i : i + 1] for field in program))
        assert torch.equal(augment.run_program(images[i : i + 1], one, COLOUR)[0], functional.pil_to_tensor(image))


# --------------------------------------------------------------------------------------------------
# RandAugment, in distribution


class Seen:
    """What timm's RandAugment asks its operators for."""

    def __init__(self, notation: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.transform = rand_augment_transform(notation, {})
        self.calls: dict[str, list[tuple[float, bool]]] = {name: [] for name in OPERATORS}
        for operator in self.transform.ops:
            name = operator.name.removesuffix("Increasing").removesuffix("Rel")
            monkeypatch.setattr(operator, "aug_fn", self._noting(name))

    def _noting(self, name: str) -> Callable[..., Any]:
        def function(image: Any, value: float = 0.0, *, resample: Any, **_: Any) -> Any:
            if isinstance(resample, tuple):
                resample = random.choice(resample)
            value = max(1, value) if name == "Posterize" else value  # Pillow refuses 0 bits, ours keeps one
            self.calls[name].append((value, resample == Image.Resampling.BICUBIC))
            return image

        return function


@pytest.mark.parametrize(
    "notation", ["rand-m9-mstd0.5-inc1", "rand-m5-n3-p0.8-mstd101-inc1", "rand-m7-mstd3-mmax8", "rand-m4-mstd0.7-n1-p1"]
)
def test_rand_augment_draws_as_timm_does(notation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(0)
    np.random.seed(0)
    images = 12_000
    timm = Seen(notation, monkeypatch)
    for _ in range(images):
        timm.transform(None)
    program = Draw(FinetuneSettings(rand_augment=notation), 32).program(images, generator(7))
    assert len(program.operators) == timm.transform.num_layers
    table = []
    for place, name in enumerate(OPERATORS):
        own = program.operators == place
        theirs = torch.tensor(timm.calls[name], dtype=torch.float64)
        table.append([int(own.sum()), len(theirs)])
        if name in MOVES:
            shares = [program.bicubic[own].double().mean(), theirs[:, 1].mean()]
            assert abs(shares[0] - 0.5) < 0.05 and abs(shares[1] - 0.5) < 0.05
        if name in WHOLE:
            kinds = sorted({*program.values[own].tolist(), *theirs[:, 0].tolist()})
            counts = [
                [Counter(values.tolist())[kind] for kind in kinds] for values in (program.values[own], theirs[:, 0])
            ]
            assert len(kinds) == 1 or stats.chi2_contingency(np.array(counts) + 1).pvalue > 1e-4, name
        else:
            assert stats.ks_2samp(program.values[own].numpy(), theirs[:, 0].numpy()).pvalue > 1e-4, name
    table.append(
        [program.operators.numel() - sum(a for a, _ in table), program.operators.numel() - sum(b for _, b in table)]
    )
    table = [row for row in table if any(row)]
    assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize("name", SCALES)
def test_a_magnitude_means_what_timm_makes_of_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    level = auto_augment.LEVEL_TO_ARG[name]
    scale = SCALES[name]
    for magnitude in (0.0, 2.5, 3.7, 5.0, 9.0, 9.49, 9.999, 13.0):
        for up in (0.7, 0.2):
            monkeypatch.setattr(auto_augment.random, "random", lambda up=up: up)
            moved = scale.most * (magnitude / 10)
            moved = np.floor(moved) if scale.whole else moved
            ours = np.clip(
                scale.start + moved * (scale.direction or (-1 if up > 0.5 else 1)), scale.least, scale.greatest
            )
            theirs = (0.0,) if level is None else level(magnitude, {})
            if name.startswith("Posterize"):
                theirs = (max(1, theirs[0]),)  # 0 bits, which Pillow refuses
            if name.startswith("Solarize") and not name.endswith("Add"):
                theirs = (theirs[0],) if magnitude <= 10 else (ours,)  # beyond 0 and 256 thresholds mean the same
            assert theirs[0] == pytest.approx(ours, abs=1e-12), (magnitude, up)


def test_every_operator_of_timms_sets_is_known() -> None:
    for names in (auto_augment._RAND_TRANSFORMS, auto_augment._RAND_INCREASING_TRANSFORMS):
        assert {name.removesuffix("Increasing").removesuffix("Rel") for name in names} == set(OPERATORS)
        assert set(names) <= set(SCALES)
    assert set(TABLES) | set(BLENDS) | set(MOVES) == set(TIMM)


def test_the_most_that_a_study_allows_is_heeded() -> None:
    """A factor of brightness is 1 +- 0.9 of the magnitude over 10."""
    for notation, most in (("rand-m9-mstd3-mmax4-inc1", 0.36), ("rand-m9-mstd3-mmax20-inc1", 1.8)):
        program = Draw(FinetuneSettings(rand_augment=notation), 32).program(4000, generator(8))
        factors = program.values[program.operators == OPERATORS.index("Brightness")]
        assert most * 0.6 < factors.max() - 1 <= most + 1e-9


def test_the_colour_jitters_factors_are_torchvisions() -> None:
    settings = FinetuneSettings(rand_augment=None, color_jitter=0.4)
    program = Draw(settings, 32).program(2000, generator(9))
    low, high = ColorJitter(0.4).brightness
    for name in ("Brightness", "Contrast", "Color"):
        factors = program.values[program.operators == OPERATORS.index(name)].numpy()
        assert len(factors) == 2000 and stats.kstest(factors, stats.uniform(low, high - low).cdf).pvalue > 1e-4
    wide = Draw(settings.model_copy(update={"color_jitter": 1.5}), 32).program(500, generator(9)).values
    assert wide.min() >= 0 and wide.max() > 2.4  # as torchvision, never below black
    assert not Draw(settings.model_copy(update={"color_jitter": 0.0}), 32).program(5, generator(9)).operators.numel()


# --------------------------------------------------------------------------------------------------
# Crops


@pytest.mark.parametrize(("source", "size"), [(32, 32), (8, 16), (28, 32), (40, 24)])
def test_a_padded_crop_is_torchvisions(source: int, size: int) -> None:
    images, draw = pictures(60, source), Draw(FinetuneSettings(), size)
    p = draw(60, source, source, generator(10))
    ours = augment.pad_crop(images, p.boxes, p.flips, size)
    padding = max(1, size // 8)
    for i in range(60):
        image = functional.resize(functional.to_pil_image(images[i]), [size, size])
        image = functional.crop(functional.pad(image, [padding]), *p.boxes[i].tolist())
        image = functional.hflip(image) if p.flips[i] else image
        difference = (ours[i].int() - functional.pil_to_tensor(image).int()).abs()
        assert difference.max() <= (source != size)  # a resized pixel may round the other way
    assert 15 < p.flips.sum() < 45


def test_a_grayscale_datasets_shared_channels_work() -> None:
    one = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8, generator=generator(5))
    p = Draw(FinetuneSettings(), 16)(16, 8, 8, generator(11))
    for crop in (augment.pad_crop, augment.resized_crop):
        boxes = p.boxes if crop is augment.pad_crop else torch.tensor([[1, 2, 5, 4]] * 16)
        shared = crop(one.expand(-1, 3, -1, -1), boxes, p.flips, 16)
        assert torch.equal(shared, crop(one.repeat(1, 3, 1, 1), boxes, p.flips, 16))


@pytest.mark.parametrize("crop", [augment.pad_crop, augment.resized_crop])
@pytest.mark.parametrize("lies", ["channels last", "transposed", "every second"])
def test_a_crop_does_not_depend_on_how_pixels_lie(crop: Callable[..., Tensor], lies: str) -> None:
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8, generator=generator(6))
    if lies == "channels last":
        other = images.contiguous(memory_format=torch.channels_last)
    elif lies == "transposed":
        other = images.mT.contiguous().mT
    else:
        other = images.repeat_interleave(2, 3)[..., ::2]
    assert torch.equal(other, images) and not other.is_contiguous()
    boxes, flips = torch.tensor([[1, 2, 5, 4]] * 16), torch.arange(16) % 2 > 0
    assert torch.equal(crop(other, boxes, flips, 16), crop(images, boxes, flips, 16))


def test_padded_crops_lie_everywhere_alike() -> None:
    boxes = Draw(FinetuneSettings(), 32).boxes(torch.full((8100,), 32), torch.full((8100,), 32), generator(12))
    assert torch.equal(boxes[:, 2:], torch.full((8100, 2), 32))
    corners = Counter(map(tuple, boxes[:, :2].tolist()))
    assert set(corners) == {(top, left) for top in range(9) for left in range(9)}
    assert stats.chisquare(list(corners.values())).pvalue > 1e-4


class Products(TorchDispatchMode):
    """Notes the precision that each product would have on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.precisions: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "convolution"):
            self.precisions.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "products"), [("view", 5), ("crops", 3), ("probe", 2), ("resized", 2), ("padded", 0), ("operators", 0)]
)
def test_pixels_are_products_of_full_float32_on_a_gpu_too_and_training_keeps_tf32(name: str, products: int) -> None:
    images, size, none = pictures(16, 24), 24, (0.0,) * 3
    p = draw_parameters(1, 16, 24, 24, ViewSettings(blur=(1.0, 1.0)), generator())
    program = Draw(FinetuneSettings(), size)(16, 24, 24, generator()).program
    torch.set_float32_matmul_precision("high")
    try:
        with Products() as made:
            if name == "view":
                apply_view(images, p, size, none, (1.0,) * 3)
            elif name == "crops":
                apply_crops(images, p, none, (1.0,) * 3)
            elif name == "probe":
                crop_resize(images, p.boxes.float(), p.flips, size)
            elif name == "resized":
                augment.resized_crop(images, p.boxes, p.flips, size)
            elif name == "padded":
                augment.pad_crop(images, p.boxes.clamp(max=4), p.flips, size)
            else:
                augment.run_program(images, program, COLOUR)
        assert made.precisions == products * ["highest"]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (70, 45, 32), (8, 8, 16)])
def test_a_resized_crop_is_pillows(height: int, width: int, size: int) -> None:
    """In two passes, columns first; in one call Pillow 13 takes rows first where that is cheaper."""
    images = torch.randint(0, 256, (80, 3, height, width), dtype=torch.uint8, generator=generator(13))
    photograph = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)
    images[40:] = functional.resize(photograph, [height, width])
    p = Draw(FinetuneSettings(crop="resized"), size)(80, height, width, generator(14))
    ours = augment.resized_crop(images, p.boxes, p.flips, size)
    for i in range(80):
        box, cubic = p.boxes[i].tolist(), Image.Resampling.BICUBIC
        crop = functional.crop(functional.to_pil_image(images[i]), *box)
        passes = crop.resize((size, box[2]), cubic).resize((size, size), cubic)
        differences = []
        for image in (passes, crop.resize((size, size), cubic)):
            image = functional.hflip(image) if p.flips[i] else image
            differences.append((ours[i].int() - functional.pil_to_tensor(image).int()).abs())
        assert differences[0].max() <= 1 and (differences[0] > 0).float().mean() < 0.01
        # in noise it matters in which pass an overshoot is clipped, in a photograph hardly
        assert i < 40 or (differences[1].max() <= 8 and differences[1].float().mean() < 0.3)


# --------------------------------------------------------------------------------------------------
# Erasing


def test_erased_boxes_are_drawn_as_timm_draws_them() -> None:
    """Found in timm's result: constant images, of which it erases boxes."""
    random.seed(0)
    torch.manual_seed(0)
    size, images = 32, 6000
    erase = RandomErasing(0.6, mode="pixel", device="cpu")
    theirs = []
    for image in torch.full((images, 3, size, size), 9.0):
        changed = (erase(image) != 9).any(0)
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        if len(rows):
            top, left = int(rows[0]), int(columns[0])
            theirs.append((top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left))
    boxes = Draw(FinetuneSettings(erasing=0.6), size).erased(images, generator(15))
    assert boxes is not None
    ours = boxes[boxes[:, 2] > 0].tolist()
    assert stats.chi2_contingency([[len(x), images - len(x)] for x in (ours, theirs)]).pvalue > 1e-4
    for column in range(4):
        counts = [np.bincount([box[column] for box in x], minlength=size + 1) + 1 for x in (ours, theirs)]
        assert stats.chi2_contingency(counts).pvalue > 1e-4
    areas = [[box[2] * box[3] for box in x] for x in (ours, theirs)]
    assert stats.ks_2samp(*areas).pvalue > 1e-4
    assert all(top + height <= size and left + width <= size for top, left, height, width in ours)


def test_a_box_is_filled_with_normal_noise_and_nothing_else_changes() -> None:
    x = torch.full((400, 3, 16, 16), 9.0)
    boxes = Draw(FinetuneSettings(erasing=0.7), 16).erased(400, generator(16))
    assert boxes is not None
    erased = augment.erase(x.clone(), boxes, slice(0, 400), generator(17))
    noise = []
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert torch.equal(erased[i] != 9, inside.expand(3, -1, -1))
        noise.append(erased[i][:, inside].flatten())
    values = torch.cat(noise)
    assert len(values) > 10_000 and len(values.unique()) > 0.999 * len(values)  # every pixel and channel has its own
    assert stats.kstest(values.numpy(), stats.norm.cdf).pvalue > 1e-4


# --------------------------------------------------------------------------------------------------
# Mixing


def neighbours(x: Tensor) -> Tensor:
    """The batch in an order in which timm's pairs, the first with the last, are ours."""
    half = len(x) // 2
    order = torch.cat([2 * torch.arange(half), (2 * torch.arange(half) + 1).flip(0)])
    return x[order], order  # type: ignore[return-value]


@pytest.mark.parametrize("cuts", [False, True])
def test_mixing_is_timms_with_the_same_lambda(cuts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = torch.rand(12, 3, 16, 16, generator=generator(18)), torch.arange(12) % 5
    theirs = Mixup(0.8, 1.0, switch_prob=1.0 if cuts else 0.0, label_smoothing=0.1, num_classes=5)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (0.63, cuts))
    np.random.seed(3)
    box, share = cutmix_bbox_and_lam(x.shape, 0.63)
    np.random.seed(3)  # timm cuts the same box again
    mix = Mix(float(share), tuple(int(side) for side in box)) if cuts else Mix(0.63, None)  # type: ignore[arg-type]
    for_timm, order = neighbours(x)
    expected, targets = theirs(for_timm.clone(), labels[order])
    assert torch.allclose(augment.mix_images(x.clone(), mix)[order], expected, atol=1e-7)
    assert torch.allclose(augment.soft_targets(labels, 5, 0.1, mix)[order], targets, atol=1e-7)
    assert not torch.allclose(expected, for_timm)


@pytest.mark.parametrize(
    ("mixup", "cutmix", "switch"), [(0.8, 1.0, 0.5), (0.8, 0.0, 0.5), (0.0, 1.0, 0.5), (0.3, 2.0, 0.8)]
)
def test_lambdas_and_boxes_are_drawn_as_timm_draws_them(mixup: float, cutmix: float, switch: float) -> None:
    np.random.seed(0)
    timm, batches, shape = Mixup(mixup, cutmix, switch_prob=switch), 3000, (8, 3, 32, 32)
    theirs: dict[bool, list[tuple[float, ...]]] = {False: [], True: []}
    for _ in range(batches):
        share, cuts = timm._params_per_batch()
        box, share = cutmix_bbox_and_lam(shape, share) if cuts else ((), share)
        theirs[cuts].append((float(share), *map(float, box)))
    draw = Draw(FinetuneSettings(mixup=mixup, cutmix=cutmix, mixup_switch=switch), 32)
    ours: dict[bool, list[tuple[float, ...]]] = {False: [], True: []}
    for batch in range(batches):
        mix = draw.mix(generator(batch))
        assert mix is not None
        ours[mix.box is not None].append((mix.share, *(mix.box or ())))
    table = [[len(found[cuts]) + 1 for cuts in (False, True)] for found in (ours, theirs)]
    assert stats.chi2_contingency(table).pvalue > 1e-4
    for cuts in (False, True):
        for one, other in zip(zip(*ours[cuts], strict=True), zip(*theirs[cuts], strict=True), strict=True):
            assert stats.ks_2samp(one, other).pvalue > 1e-4


def test_without_mixing_targets_are_smoothed_labels() -> None:
    labels = torch.tensor([2, 0, 1])
    assert Draw(FinetuneSettings(mixup=0.0, cutmix=0.0), 16).mix(generator()) is None
    assert torch.allclose(augment.soft_targets(labels, 3, 0.3, None), mixup_target(labels, 3, 1.0, 0.3))
    assert torch.equal(augment.soft_targets(labels, 3, 0.0, None), torch.eye(3)[labels])
