"""The samplers against independent, slow and obvious ones: pixels painted on a canvas, cells drawn one after the other."""

import math
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from aps.errors import UserError
from aps.registry import STRATEGIES
from aps.sampling import ROUNDING, Geometry, Noise, Strategy, coverage, kept_cells, least, sample, selective, sparse
from aps.settings.blocks import SamplingSettings, ViewSettings
from aps.views import apply_view, draw_parameters

# --------------------------------------------------------------------------------------------------
# Independent references


def painted(box1, flip1, kept1, box2, flip2, grid) -> np.ndarray:
    """Coverage by painting: float64 (N,). Coordinates are stretched by G, so cells begin and end on whole pixels."""
    box1, box2 = [[grid * int(v) for v in box] for box in (box1, box2)]
    height = max(box[0] + box[2] for box in (box1, box2))
    width = max(box[1] + box[3] for box in (box1, box2))
    canvas = np.zeros((height, width))
    seen = np.zeros(grid * grid)
    seen[list(kept1)] = 1
    view = np.kron(seen.reshape(grid, grid), np.ones((box1[2] // grid, box1[3] // grid)))
    top, left, tall, wide = box1
    canvas[top : top + tall, left : left + wide] = view[:, ::-1] if flip1 else view
    top, left, tall, wide = box2
    view = canvas[top : top + tall, left : left + wide]
    view = view[:, ::-1] if flip2 else view
    return view.reshape(grid, tall // grid, grid, wide // grid).mean((1, 3)).ravel()


def set_probabilities(weights: np.ndarray, kept: int) -> dict[tuple[int, ...], float]:
    """Probability of each set of `kept` cells under successive draws in proportion to weights, by enumeration."""
    sets = dict.fromkeys(combinations(range(len(weights)), kept), 0.0)
    for order in permutations(range(len(weights)), kept):
        probability, left = 1.0, weights.sum()
        for cell in order:
            probability *= weights[cell] / left if left > 0 else 0.0
            left -= weights[cell]
        sets[tuple(sorted(order))] += probability
    return sets


def one_after_another(weights: np.ndarray, kept: int, rng: np.random.Generator) -> list[int]:
    """Draw a cell, remove it, draw again; uniformly from the rest once no weight is left."""
    left, weights, drawn = list(range(len(weights))), list(weights), []
    for _ in range(kept):
        total = sum(weights)
        p = [w / total for w in weights] if total > 0 else [1 / len(left)] * len(left)
        pick = int(np.searchsorted(np.cumsum(p), rng.random() * sum(p), side="right"))
        drawn.append(left.pop(pick))
        weights.pop(pick)
    return drawn


def goodness(draws: Tensor, expected: dict[tuple[int, ...], float]) -> float:
    """p-value of a chi-square test that sets drawn, draws (M, n), follow their probabilities."""
    keys = {cells: i for i, cells in enumerate(expected)}
    counts = np.zeros(len(keys))
    for cells in draws.sort(1).values.tolist():
        counts[keys[tuple(cells)]] += 1
    wanted = np.array(list(expected.values())) * len(draws)
    assert (counts[wanted == 0] == 0).all()
    few = wanted < 5  # one class for all rare sets, as the test's approximation asks
    counts, wanted = [np.append(v[~few], v[few].sum()) for v in (counts, wanted)]
    possible = wanted > 0
    return float(stats.chisquare(counts[possible], wanted[possible]).pvalue)


def uniform(batch: int, seed: int):
    """Noise for `selective` and `sparse`."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.rand(batch, *shape, generator=generator).clamp_(min=2.0**-25)


def geometry(boxes, flips=False) -> Geometry:
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Geometry(boxes, torch.as_tensor(flips).expand(len(boxes)))


def one_hot(cells: Tensor, count: int) -> Tensor:
    return torch.zeros(*cells.shape[:-1], count).scatter_(-1, cells, 1)


# --------------------------------------------------------------------------------------------------
# Coverage


@st.composite
def pairs(draw):
    grid = draw(st.integers(1, 6))
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))

    def box():
        tall, wide = draw(st.integers(1, height)), draw(st.integers(1, width))
        return draw(st.integers(0, height - tall)), draw(st.integers(0, width - wide)), tall, wide

    kept = draw(st.lists(st.sets(st.integers(0, grid * grid - 1)), min_size=1, max_size=3))
    return grid, box(), draw(st.booleans()), kept, box(), draw(st.booleans())


@settings(max_examples=300, derandomize=True, deadline=None)
@given(pairs())
def test_coverage_equals_painting_pixels(pair):
    grid, box1, flip1, kept, box2, flip2 = pair
    mask = torch.zeros(1, len(kept), grid * grid)
    for t, cells in enumerate(kept):
        mask[0, t, list(cells)] = 1
    found = coverage(geometry(box1, flip1), mask, geometry(box2, flip2), grid)
    expected = np.stack([painted(box1, flip1, cells, box2, flip2, grid) for cells in kept])
    assert found.shape == (1, len(kept), grid * grid)
    assert np.abs(found[0].numpy() - expected).max() < 1e-6
    assert found.min() >= 0 and found.max() <= 1
    # as the authors' release has it: as if nothing had been flipped
    unaware = coverage(geometry(box1, flip1), mask, geometry(box2, flip2), grid, flip_aware=False)
    expected = np.stack([painted(box1, False, cells, box2, False, grid) for cells in kept])
    assert np.abs(unaware[0].numpy() - expected).max() < 1e-6


def test_coverage_of_a_batch_is_that_of_its_images_and_samplings():
    generator = torch.Generator().manual_seed(0)
    one, two = (draw_parameters(v, 16, 57, 91, ViewSettings(), generator).geometry() for v in (1, 2))
    mask = (torch.rand(16, 3, 49, generator=generator) < 0.3).float()
    together = coverage(one, mask, two, 7)
    for i in range(16):
        for t in range(3):
            alone = painted(one.boxes[i], one.flips[i], mask[i, t].nonzero()[:, 0], two.boxes[i], two.flips[i], 7)
            assert np.abs(together[i, t].numpy() - alone).max() < 1e-6


def test_coverage_ignoring_flips_is_wrong_for_a_flipped_pair():
    mask = one_hot(torch.tensor([[[0, 3]]]), 9)
    same = coverage(geometry([0, 0, 9, 9]), mask, geometry([0, 0, 9, 9], True), 3)
    assert same.nonzero()[:, 2].tolist() == [2, 5]  # the mirrored column
    release = coverage(geometry([0, 0, 9, 9]), mask, geometry([0, 0, 9, 9], True), 3, flip_aware=False)
    assert release.nonzero()[:, 2].tolist() == [0, 3]
    both = coverage(geometry([0, 0, 9, 9], True), mask, geometry([0, 0, 9, 9], True), 3)
    assert torch.equal(both, mask)  # two flips cancel here


def test_a_covered_cell_is_known_as_covered_in_large_sources_and_fine_grids():
    """Rounding must not leave a cell a weight: the draw would prefer some covered cells to others."""
    generator = torch.Generator().manual_seed(1)
    for grid in (14, 16, 64):
        one = draw_parameters(1, 64, 3000, 4000, ViewSettings(), generator).geometry()
        two = draw_parameters(2, 64, 3000, 4000, ViewSettings(), generator).geometry()
        everything = coverage(one, torch.ones(64, 1, grid * grid), two, grid)[:, 0].view(64, grid, grid)
        top1, left1, tall1, wide1 = one.boxes.double().T[:, :, None]
        top2, left2, tall2, wide2 = two.boxes.double().T[:, :, None]
        cell = torch.arange(grid, dtype=torch.float64)
        cell_x = torch.where(two.flips[:, None], grid - 1 - cell, cell)
        inside_y = (top2 + cell * tall2 / grid >= top1) & (top2 + (cell + 1) * tall2 / grid <= top1 + tall1)
        inside_x = (left2 + cell_x * wide2 / grid >= left1) & (left2 + (cell_x + 1) * wide2 / grid <= left1 + wide1)
        inside = inside_y[:, :, None] & inside_x[:, None, :]
        assert inside.any()
        assert (1 - everything[inside]).max() < ROUNDING / 10


# --------------------------------------------------------------------------------------------------
# Draws

WEIGHTS = np.array([1.0, 0.9, 0.6, 0.35, 0.8, 0.1, 1.0])  # 1 - cov of 7 cells


def drawn_by(sampler, gamma: float, draws: int = 20000) -> Tensor:
    covered = torch.tensor(1 - WEIGHTS, dtype=torch.float32).expand(draws, 1, -1)
    return sampler(covered, 3, gamma, uniform(draws, 7))[:, 0]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 3.0])
def test_sets_drawn_have_the_probabilities_of_successive_draws(gamma):
    assert goodness(drawn_by(selective, gamma), set_probabilities(WEIGHTS**gamma, 3)) > 1e-3


def gaussian_noise(covered, kept, gamma, noise):
    return (gamma * (1 - covered).log() + torch.special.ndtri(noise(*covered.shape[1:]))).topk(kept, 2).indices


def square_instead(covered, kept, gamma, noise):
    return selective(covered, kept, 2.0, noise)


def weights_of_coverage(covered, kept, gamma, noise):
    return selective(1 - covered, kept, gamma, noise)


def additive_noise(covered, kept, gamma, noise):
    return ((1 - covered) ** gamma + noise(*covered.shape[1:])).topk(kept, 2).indices


def inclusion_in_proportion(covered, kept, gamma, noise):
    """Systematic sampling: inclusion probabilities proportional to weights, another scheme without replacement."""
    weights = (1 - covered[:, 0]) ** gamma
    order = noise(covered.shape[2]).argsort(1)
    ends = weights.gather(1, order).cumsum(1) / weights.sum(1, keepdim=True) * kept
    points = noise(1) + torch.arange(kept)
    return order.gather(1, (points[:, :, None] >= ends[:, None]).sum(2).clamp(max=covered.shape[2] - 1))[:, None]


@pytest.mark.parametrize("wrong", [gaussian_noise, square_instead, weights_of_coverage, additive_noise])
def test_a_wrong_sampler_would_be_noticed(wrong):
    assert goodness(drawn_by(wrong, 3.0), set_probabilities(WEIGHTS**3, 3)) < 1e-6


def test_sampling_in_proportion_to_weights_would_be_noticed():
    """At gamma 1, where no inclusion probability exceeds 1."""
    weights = np.array([1.0, 0.9, 0.6, 0.35, 0.8, 0.5, 1.0])
    covered = torch.tensor(1 - weights, dtype=torch.float32).expand(20000, 1, -1)
    expected = set_probabilities(weights, 3)
    assert goodness(selective(covered, 3, 1.0, uniform(20000, 7))[:, 0], expected) > 1e-3
    assert goodness(inclusion_in_proportion(covered, 3, 1.0, uniform(20000, 7))[:, 0], expected) < 1e-6


def test_at_the_greatest_gamma_covered_cells_still_come_last_and_in_random_order():
    greatest = 1000.0
    with pytest.raises(ValueError, match="less than or equal to 1000"):
        SamplingSettings(gamma=math.nextafter(greatest, math.inf))
    covered = torch.tensor([1.0, 0.5, 1.0, 0.9, 1 - 2 * ROUNDING, 1.0, 0.0]).expand(6000, 1, -1)
    drawn = selective(covered, 7, SamplingSettings(gamma=greatest).gamma, uniform(6000, 7))[:, 0]
    assert (drawn[:, :4] == torch.tensor([6, 1, 3, 4])).all()
    orders = drawn[:, 4:].unique(dim=0, return_counts=True)
    assert len(orders[0]) == 6 and orders[1].min() > 850  # of 1,000 expected


def test_inclusion_frequencies_match_drawing_one_after_another():
    """On the coverage of a real pair with covered, part-covered and free cells: 64 cells, 16 kept."""
    one, two = geometry([0, 3, 32, 29]), geometry([8, 7, 11, 12], True)
    mask = one_hot(sparse(8, 16, 1, uniform(1, 3)), 64)
    covered = coverage(one, mask, two, 8)
    weights = (1 - covered[0, 0].double().numpy()).clip(0) ** 3
    assert (weights < 1e-4).any() and (weights == 1).any() and ((weights > 0.01) & (weights < 0.9)).any()
    draws, slow = 20000, 2500
    ours = one_hot(selective(covered.expand(draws, -1, -1), 16, 3.0, uniform(draws, 5)), 64)[:, 0].sum(0).numpy()
    rng = np.random.default_rng(11)
    theirs = np.zeros(64)
    for _ in range(slow):
        theirs[one_after_another(weights, 16, rng)] += 1

    def p_value(counts: np.ndarray) -> float:
        pooled = (counts + theirs) / (draws + slow)
        variance = pooled * (1 - pooled) * (1 / draws + 1 / slow)
        some = variance > 0
        z = (counts / draws - theirs / slow)[some] / np.sqrt(variance[some])
        # counts of a draw sum to 16, so z are negatively correlated and this is on the safe side
        return float(stats.chi2.sf((z**2).sum(), some.sum() - 1))

    assert p_value(ours) > 1e-3
    wrong = one_hot(selective(covered.expand(draws, -1, -1), 16, 2.0, uniform(draws, 5)), 64)[:, 0].sum(0).numpy()
    assert p_value(wrong) < 1e-6


@pytest.mark.parametrize(("flip1", "flip2"), [(False, False), (True, False), (False, True), (True, True)])
def test_pairs_of_cells_drawn_end_to_end_have_the_joint_distribution_of_the_method(flip1, flip2):
    """G=2, one cell each: view 1 uniform, view 2 in proportion to the painted (1 - cov)^gamma."""
    box1, box2, batch = [2, 1, 9, 11], [4, 5, 10, 7], 20000
    expected = np.zeros((4, 4))
    for cell in range(4):
        weights = (1 - painted(box1, flip1, [cell], box2, flip2, 2)) ** 2
        expected[cell] = weights / weights.sum() / 4
    settings = SamplingSettings(ratio=0.25, samplings=1, gamma=2.0)
    one, two = geometry([box1] * batch, flip1), geometry([box2] * batch, flip2)
    kept = sample(settings, 2, one, two, torch.Generator().manual_seed(2))
    counts = torch.bincount(4 * kept.view1[0, :, 0] + kept.view2[0, :, 0], minlength=16).numpy()
    assert stats.chisquare(counts, expected.ravel() * batch).pvalue > 1e-3
    if flip1 != flip2:  # and not that of a sampler that ignores flips
        unaware = sample(
            settings.model_copy(update={"flip_aware": False}), 2, one, two, torch.Generator().manual_seed(2)
        )
        counts = torch.bincount(4 * unaware.view1[0, :, 0] + unaware.view2[0, :, 0], minlength=16).numpy()
        assert stats.chisquare(counts, expected.ravel() * batch).pvalue < 1e-6


def test_view_1_chunks_are_disjoint_uniform_and_use_each_cell_once_at_t4_r025():
    cells = sparse(4, 4, 4, uniform(20000, 1))
    assert cells.shape == (20000, 4, 4)
    assert torch.equal(cells.flatten(1).sort(1).values, torch.arange(16).expand(20000, 16))
    for t in range(4):  # each cell is as likely in every chunk
        assert stats.chisquare(torch.bincount(cells[:, t].flatten())).pvalue > 1e-3
    pairs_of_cells = cells[:, 0, 0] * 16 + cells[:, 1, 0]
    counts = torch.bincount(pairs_of_cells, minlength=256).view(16, 16)
    assert counts.diagonal().sum() == 0
    assert stats.chisquare(counts[~torch.eye(16, dtype=torch.bool)]).pvalue > 1e-3


@pytest.mark.parametrize("strategy", ["asymmetric", "random", "full"])
@pytest.mark.parametrize(("grid", "ratio", "samplings"), [(16, 0.25, 4), (14, 0.25, 3), (5, 0.3, 2), (4, 1.0, 1)])
def test_every_draw_keeps_n_distinct_cells(strategy, grid, ratio, samplings):
    generator = torch.Generator().manual_seed(0)
    one, two = (draw_parameters(v, 32, 40, 30, ViewSettings(), generator).geometry() for v in (1, 2))
    settings = SamplingSettings(strategy=strategy, ratio=ratio, samplings=samplings)
    kept = sample(settings, grid, one, two, generator)
    n = grid * grid if strategy == "full" else int(grid * grid * ratio)
    for cells in kept:
        assert cells.shape == (samplings, 32, n) and cells.dtype == torch.int64 and cells.is_contiguous()
        ordered = cells.sort(2).values
        assert (ordered.diff(dim=2) > 0).all() and ordered.min() >= 0 and ordered.max() < grid * grid


# --------------------------------------------------------------------------------------------------
# What the method is for: pairs that share little appearance


def shared_appearance(settings: SamplingSettings, crops: ViewSettings, images: int = 96) -> tuple[float, np.ndarray]:
    """Share of view 2's visible pixels that are visible in view 1 too, found in the views' pixels alone.

    Every pixel of the 32x32 sources has a colour that says where it is; the views are cut from them by the real
    pipeline, so nothing here relies on the sampler's own geometry. Returns the mean, and the share of each image.
    """
    height = width = 32
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    where = torch.stack([7 * y, 7 * x, 0 * x]).to(torch.uint8).expand(images, 3, height, width)
    size, grid, generator = 64, 8, torch.Generator().manual_seed(3)
    parameters = [draw_parameters(v, images, height, width, crops, generator) for v in (1, 2)]
    visible = []
    kept = sample(settings, grid, parameters[0].geometry(), parameters[1].geometry(), generator)
    for p, cells in zip(parameters, kept, strict=True):
        view = apply_view(where, p, size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)) * 255 / 7
        place = view[:, 0].round() * width + view[:, 1].round()  # (B, S, S) source pixel of each view pixel
        patches = (
            place.unflatten(2, (grid, -1)).unflatten(1, (grid, -1)).transpose(2, 3).reshape(images, grid * grid, -1)
        )
        visible.append(patches.gather(1, cells[0][:, :, None].expand(-1, -1, patches.shape[2])).flatten(1).long())
    share = [np.isin(b.numpy(), a.numpy()).mean() for a, b in zip(*visible, strict=True)]
    return float(np.mean(share)), np.array(share)


PLAIN = ViewSettings(color_jitter_prob=0.0, grayscale=0.0)


def test_shared_appearance_grows_from_asymmetric_to_random_to_full():
    shares = [shared_appearance(SamplingSettings(strategy=s), PLAIN)[0] for s in ("asymmetric", "random", "full")]
    assert shares[0] < 0.6 * shares[1] < 0.5 * shares[2], shares


def test_shared_appearance_falls_as_gamma_grows():
    shares = [shared_appearance(SamplingSettings(gamma=gamma), PLAIN)[0] for gamma in (0.0, 0.5, 1.0, 3.0, 10.0)]
    assert all(later < earlier for earlier, later in pairwise(shares)), shares
    random = shared_appearance(SamplingSettings(strategy="random"), PLAIN)[0]
    assert abs(shares[0] - random) < 0.03  # gamma 0 prefers nothing


def test_ignoring_flips_shares_more_appearance_where_one_view_is_flipped():
    one_flipped = PLAIN.model_copy(update={"flip": 0.5})
    aware = shared_appearance(SamplingSettings(), one_flipped, 192)[1]
    release = shared_appearance(SamplingSettings(flip_aware=False), one_flipped, 192)[1]
    generator = torch.Generator().manual_seed(3)
    flips = [draw_parameters(v, 192, 32, 32, one_flipped, generator).flips for v in (1, 2)]
    mixed = (flips[0] != flips[1]).numpy()
    assert release[mixed].mean() > 1.3 * aware[mixed].mean()
    neither = (~flips[0] & ~flips[1]).numpy()
    assert np.array_equal(release[neither], aware[neither])


def test_the_release_draws_as_if_nothing_were_flipped():
    generator = torch.Generator().manual_seed(4)
    one, two = (draw_parameters(v, 64, 32, 32, ViewSettings(), generator).geometry() for v in (1, 2))
    unaware, aware = SamplingSettings(flip_aware=False), SamplingSettings()
    release = sample(unaware, 16, one, two, torch.Generator().manual_seed(5))
    straight = [Geometry(g.boxes, torch.zeros_like(g.flips)) for g in (one, two)]
    unflipped = sample(aware, 16, *straight, torch.Generator().manual_seed(5))
    assert torch.equal(release.view2, unflipped.view2)
    assert not torch.equal(release.view2, sample(aware, 16, one, two, torch.Generator().manual_seed(5)).view2)


# --------------------------------------------------------------------------------------------------
# Degenerate cases


def test_view_2_inside_one_kept_cell_draws_uniformly():
    covered = coverage(geometry([0, 0, 90, 90]), torch.ones(1, 1, 9), geometry([31, 32, 17, 13]), 3)
    assert (1 - covered).max() <= ROUNDING
    draws = selective(covered.expand(20000, -1, -1), 3, 3.0, uniform(20000, 1))[:, 0]
    assert goodness(draws, set_probabilities(np.ones(9), 3)) > 1e-3


def test_all_free_cells_are_kept_and_the_rest_filled_up_uniformly():
    covered = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.999, 1.0, 1.0]).expand(20000, 1, -1)
    draws = selective(covered, 4, 3.0, uniform(20000, 2))[:, 0]
    assert (draws == 1).any(1).all() and (draws == 4).any(1).all()
    fill = one_hot(draws, 7)[:, [0, 2, 3, 5, 6]].bool()
    expected = set_probabilities(np.ones(5), 2)
    assert goodness(fill.nonzero()[:, 1].view(-1, 2), expected) > 1e-3


def test_covered_cells_come_last_however_weak_the_preference():
    covered = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5, 1.0, 1.0]).expand(5000, 1, -1)
    draws = selective(covered, 2, 0.01, uniform(5000, 4))[:, 0].sort(1).values
    assert torch.equal(draws, torch.tensor([1, 4]).expand(5000, -1))


def test_identical_boxes_give_complementary_cells():
    settings = SamplingSettings(ratio=0.25, samplings=4)
    boxes = [[3, 5, 21, 17]] * 50
    kept = sample(settings, 8, geometry(boxes), geometry(boxes), torch.Generator().manual_seed(0))
    assert not (kept.view1[..., None] == kept.view2[..., None, :]).any()
    flipped = sample(settings, 8, geometry(boxes), geometry(boxes, True), torch.Generator().manual_seed(0))
    mirrored = flipped.view2 // 8 * 8 + 7 - flipped.view2 % 8
    assert not (flipped.view1[..., None] == mirrored[..., None, :]).any()


def test_identical_boxes_at_r_one_half_give_exactly_the_complement():
    boxes = [[0, 0, 32, 32]] * 20
    settings = SamplingSettings(ratio=0.5, samplings=2)
    kept = sample(settings, 4, geometry(boxes), geometry(boxes), torch.Generator().manual_seed(0))
    both = torch.cat(kept, dim=2).sort(2).values
    assert torch.equal(both, torch.arange(16).expand(2, 20, 16))


def test_disjoint_boxes_draw_uniformly():
    one, two = geometry([0, 0, 10, 10]), geometry([20, 20, 10, 10])
    covered = coverage(one, torch.ones(1, 1, 9), two, 3)
    assert (covered == 0).all()
    draws = selective(covered.expand(20000, -1, -1), 3, 3.0, uniform(20000, 3))[:, 0]
    assert goodness(draws, set_probabilities(np.ones(9), 3)) > 1e-3


def test_boxes_that_only_touch_share_nothing():
    assert (coverage(geometry([0, 0, 7, 11]), torch.ones(1, 1, 25), geometry([0, 11, 7, 5]), 5) == 0).all()


def test_ratio_1_keeps_everything_whatever_the_coverage():
    settings = SamplingSettings(ratio=1.0, samplings=1)
    one, two = geometry([[0, 0, 32, 32]] * 3), geometry([[4, 4, 8, 8]] * 3)
    for cells in sample(settings, 4, one, two, torch.Generator().manual_seed(0)):
        assert torch.equal(cells.sort(2).values, torch.arange(16).expand(1, 3, 16))


def test_gamma_0_draws_uniformly_even_from_covered_cells():
    covered = torch.tensor([1.0, 1.0, 0.0, 0.5, 1.0]).expand(20000, 1, -1)
    draws = selective(covered, 2, 0.0, uniform(20000, 4))[:, 0]
    assert goodness(draws, set_probabilities(np.ones(5), 2)) > 1e-3


def test_a_huge_gamma_keeps_the_least_covered_cells_without_overflow():
    covered = torch.tensor([0.99999, 1.0, 0.9, 0.5, 0.3, 1.0, 0.99]).expand(200, 1, -1)
    draws = selective(covered, 3, 1e4, uniform(200, 5))[:, 0]
    assert torch.equal(draws.sort(1).values, torch.tensor([2, 3, 4]).expand(200, 3))
    # and a cell of hardly any weight still comes before one of none
    assert (selective(covered, 5, 1e4, uniform(200, 5)) == 0).any(2).all()


def test_a_one_pixel_box_works():
    settings = SamplingSettings(samplings=2)
    kept = sample(settings, 4, geometry([0, 0, 1, 1]), geometry([0, 0, 32, 32]), torch.Generator().manual_seed(0))
    assert kept.view2.shape == (2, 1, 4)


@pytest.mark.parametrize("strategy", ["asymmetric", "random"])
@pytest.mark.parametrize(("ratio", "samplings"), [(0.5, 3), (0.32, 4), (1.0, 2), (0.01, 1)])
def test_samplings_that_do_not_fit_the_cells_are_refused(strategy, ratio, samplings):
    settings = SamplingSettings(strategy=strategy, ratio=ratio, samplings=samplings)
    box = geometry([0, 0, 8, 8])
    with pytest.raises(UserError, match=rf"sampling.samplings {samplings} x .* at most the 16 cells.*change"):
        sample(settings, 4, box, box, torch.Generator())


def test_full_ignores_the_ratio():
    settings = SamplingSettings(strategy="full", ratio=1.0, samplings=4)
    kept = sample(settings, 4, geometry([0, 0, 8, 8]), geometry([0, 0, 8, 8]), torch.Generator())
    assert torch.equal(kept.view1, torch.arange(16).expand(4, 1, 16))


def test_n_is_the_whole_part_of_n_cells_times_r():
    assert [kept_cells(16, 0.25), kept_cells(14, 0.25), kept_cells(5, 0.3), kept_cells(7, 1.0)] == [64, 49, 7, 49]


# --------------------------------------------------------------------------------------------------
# Processes, devices, registry


@pytest.mark.parametrize("strategy", ["asymmetric", "random", "full"])
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_sees_the_draw_of_one(strategy, world):
    generator = torch.Generator().manual_seed(6)
    parameters = [draw_parameters(v, 16, 32, 48, ViewSettings(), generator) for v in (1, 2)]
    settings = SamplingSettings(strategy=strategy)
    whole = sample(settings, 8, *(p.geometry() for p in parameters), torch.Generator().manual_seed(9))
    share = 16 // world
    for rank in range(world):
        own = slice(rank * share, (rank + 1) * share)
        part = sample(
            settings, 8, *(p.rows(own).geometry() for p in parameters), torch.Generator().manual_seed(9), rank, world
        )
        assert torch.equal(part.view1, whole.view1[:, own])
        assert torch.equal(part.view2, whole.view2[:, own])


def test_the_draw_is_the_generators():
    box = geometry([[2, 3, 20, 25]] * 4)
    first, again, other = (
        sample(SamplingSettings(), 16, box, box, torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first.view1, again.view1) and torch.equal(first.view2, again.view2)
    assert not torch.equal(first.view1, other.view1) and not torch.equal(first.view2, other.view2)


@pytest.mark.parametrize("strategy", ["asymmetric", "random", "full"])
def test_sampling_never_asks_the_device_for_a_value(strategy):
    """The meta device has no values to give: anything that would synchronize raises there."""
    one = Geometry(torch.zeros(8, 4, device="meta"), torch.zeros(8, dtype=torch.bool, device="meta"))
    kept = sample(SamplingSettings(strategy=strategy), 16, one, one, torch.Generator())
    assert kept.view2.is_meta


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_what_the_cpu_draws_from_the_same_noise_without_synchronizing():
    generator = torch.Generator().manual_seed(6)
    parameters = [draw_parameters(v, 256, 224, 300, ViewSettings(), generator) for v in (1, 2)]
    cpu = sample(SamplingSettings(), 14, *(p.geometry() for p in parameters), torch.Generator().manual_seed(9))
    torch.set_float32_matmul_precision("high")  # as training has it
    try:
        torch.cuda.set_sync_debug_mode("error")
        gpu = sample(
            SamplingSettings(), 14, *(p.geometry("cuda") for p in parameters), torch.Generator().manual_seed(9)
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(cpu.view1, gpu.view1.cpu())
    same = cpu.view2.sort(2).values == gpu.view2.cpu().sort(2).values
    assert same.float().mean() > 0.999  # logarithms differ in their last digit


def test_every_registered_strategy_is_there():
    assert all(callable(STRATEGIES.load(name)) for name in STRATEGIES.names())


@pytest.mark.parametrize("levels", [3, 2**24])
def test_the_first_cells_are_the_least_in_order_and_of_equals_the_earlier(levels: int) -> None:
    values = torch.randint(1, levels, (7, 3, 50), generator=torch.Generator().manual_seed(0)).float() * 1e-3
    values[0, 0, 10] = 1e30  # as a covered cell's
    assert torch.equal(least(values, 20), values.sort(dim=-1, stable=True).indices[..., :20])


def wrong(how: str) -> Strategy:
    """A strategy with one thing wrong."""

    def strategy(settings: SamplingSettings, grid: int, view1: Geometry, view2: Geometry, noise: Noise) -> object:
        cells = STRATEGIES.load("random")(settings, grid, view1, view2, noise)[0]
        others = {
            "one tensor": cells,
            "one sampling": (cells[:, 0], cells[:, 0]),
            "fewer samplings": (cells[:, :1], cells[:, :1]),
            "floats": (cells.float(), cells.float()),
            "other widths": (cells, cells[..., :1]),
            "outside": (cells, cells + grid * grid),
            "below": (cells - 1 - cells.min(), cells),
            "twice": (cells * 0, cells),
        }
        return others[how]

    return strategy  # type: ignore[return-value]


WRONG = {
    "one tensor": "a Tensor; return two tensors",
    "one sampling": r"shape \(2, 4\), int64; return \(B, T, n\), here \(2, 3, n\)",
    "fewer samplings": r"shape \(2, 1, 4\), int64",
    "floats": r"shape \(2, 3, 4\), float32; .* int64",
    "other widths": r"shape \(2, 3, 1\), int64; .* the same n for both views",
    "outside": "a cell that is none of 0 to 15",
    "below": "a cell that is none of 0 to 15",
    "twice": "a cell twice; return n different cells",
}


@pytest.mark.parametrize("how", WRONG)
def test_a_strategy_that_returns_something_else_than_cells_is_told_so(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "own", wrong(how))
    monkeypatch.setattr(STRATEGIES, "_rows", STRATEGIES._rows | {"own": f"{__name__}:own"})
    whole = Geometry(torch.tensor([[0.0, 0.0, 8.0, 8.0]] * 2), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(UserError, match=rf"^sampling.strategy own \({__file__}\) returned .*{WRONG[how]}"):
        sample(SamplingSettings(strategy="own", samplings=3), 4, whole, whole, torch.Generator())
