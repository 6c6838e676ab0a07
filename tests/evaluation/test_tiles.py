"""Tiles cover each pixel, and what is pointwise comes out of them exactly."""

import pytest
import torch
from torch.nn.functional import avg_pool2d

from distseg.evaluation.tiles import count_tiles, predict_by_tiles


def picture(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.7])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 16), (40, 91), (123, 64)])
def test_a_pointwise_network_by_tiles_is_exactly_the_network(height, width, overlap):
    def predict(images):
        return torch.stack([images[:, 0] * 1e3, images[:, 1].exp() - images[:, 2]], dim=1)

    images = picture(height, width)
    assert torch.equal(predict_by_tiles(predict, images, 16, overlap, 3), predict(images))


def test_the_network_sees_whole_tiles_in_batches_of_no_more_than_it_may():
    shapes = []

    def predict(images):
        shapes.append(tuple(images.shape))
        return images[:, :1]

    predict_by_tiles(predict, picture(50, 70), 16, 0.25, 4)
    assert {shape[1:] for shape in shapes} == {(3, 16, 16)}
    assert max(shape[0] for shape in shapes) == 4
    assert sum(shape[0] for shape in shapes) == count_tiles(50, 70, 16, 0.25) == 4 * 6


def test_where_tiles_differ_the_nearer_centre_counts_more():
    """Two tiles of 8 that overlap by 4 and say 0 and 1: by hand (0·w + 1·v) / (w + v)."""
    numbers = iter([0.0, 1.0])

    def predict(images):
        return torch.stack([torch.full((1, 8, 8), next(numbers)) for _ in images])

    blended = predict_by_tiles(predict, picture(8, 12), 8, 0.5, 1)[0, 0]
    expected = torch.tensor([0, 0, 0, 0, 1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 1, 1, 1])
    torch.testing.assert_close(blended, expected.expand(8, 12), rtol=0, atol=1e-7)


def test_what_is_not_finite_stays_so():
    images = picture(20, 20)
    images[0, 0, 3, 4] = float("nan")
    blended = predict_by_tiles(lambda images: images[:, :1], images, 16, 0.5, 2)
    assert torch.isnan(blended).nonzero().tolist() == [[0, 0, 3, 4]]


def test_with_neighbours_a_pixel_in_the_middle_of_its_tiles_is_that_of_the_whole():
    def predict(images):
        return avg_pool2d(images[:, :1], 3, 1, 1, count_include_pad=False)

    images = picture(16, 48)
    blended, whole = predict_by_tiles(predict, images, 16, 0.0, 8), predict(images)
    inner = [column for column in range(48) if column % 16 not in (0, 15)]
    torch.testing.assert_close(blended[..., inner], whole[..., inner])
