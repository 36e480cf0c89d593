import torch

from aps.data.statistics import Accumulator


def test_statistics_over_chunks_equal_those_over_all_pixels_at_once() -> None:
    images = torch.randint(0, 256, (37, 3, 9, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    accumulator = Accumulator()
    for chunk in images.split(8):
        accumulator.add(chunk)
    result = accumulator.result("all")
    x = images.double() / 255
    torch.testing.assert_close(torch.tensor(result.mean, dtype=torch.float64), x.mean((0, 2, 3)), rtol=0, atol=1e-14)
    torch.testing.assert_close(
        torch.tensor(result.std, dtype=torch.float64), x.std((0, 2, 3), correction=0), rtol=0, atol=1e-12
    )


def test_a_single_channel_is_given_to_all_three() -> None:
    accumulator = Accumulator()
    accumulator.add(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
    assert accumulator.result("all").mean == (0.5, 0.5, 0.5)
    assert accumulator.result("all").std == (0.5, 0.5, 0.5)


def test_a_large_image_counts_as_much_as_a_small_one() -> None:
    accumulator = Accumulator()
    accumulator.add(torch.zeros(1, 3, 100, 100, dtype=torch.uint8))
    accumulator.add(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    assert accumulator.result("all").mean == (0.5, 0.5, 0.5)


def test_images_of_one_colour_have_a_deviation_of_zero() -> None:
    accumulator = Accumulator()
    accumulator.add(torch.full((50, 3, 7, 7), 77, dtype=torch.uint8))
    assert max(accumulator.result("all").std) < 1e-7
