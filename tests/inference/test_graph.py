"""The graph of an export against PIL and torch's interpolation, and what is no graph."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from distseg.data.augment import CHANNEL_DEVIATIONS, CHANNEL_MEANS
from distseg.data.decode import read_canvas, read_reduced
from distseg.data.geometry import Frame, Shape
from distseg.errors import UserError
from distseg.inference.graph import Deployable
from distseg.models.unet import UNet

SIZES = [(57, 91), (91, 40), (32, 32), (20, 33), (3, 150), (211, 300)]


def by_pil(network: torch.nn.Module, images: np.ndarray, frame: Frame) -> torch.Tensor:
    """Logits (B, C, H, W) as training's loaders and `predict` come to them, columns first.

    Of tall images PIL reduces the rows first, and grey levels are rounded the other way here and there.
    """
    height, width = images.shape[1:3]
    place = frame.place(height, width)
    linear = Image.Resampling.BILINEAR
    narrow = [Image.fromarray(image).resize((place.width, height), linear) for image in images]
    reduced = [each.resize((place.width, place.height), linear) for each in narrow]
    canvas = np.stack([place.laid(np.asarray(each), frame.image_fill) for each in reduced])
    pixels = ((canvas / 255 - CHANNEL_MEANS) / CHANNEL_DEVIATIONS).astype(np.float32).transpose(0, 3, 1, 2)
    with torch.no_grad():
        logits = network(torch.from_numpy(pixels))[:, :, *place.picture]
    return interpolate(logits, (height, width), mode="bilinear", align_corners=False)


def pictures(count: int, height: int, width: int) -> np.ndarray:
    """Smooth, as photographs are, with some noise."""
    rng = np.random.default_rng(height * width)
    coarse = rng.integers(0, 256, (count, 6, 7, 3), dtype=np.uint8)
    smooth = [Image.fromarray(each).resize((width, height), Image.Resampling.BICUBIC) for each in coarse]
    noise = rng.integers(-8, 9, (count, height, width, 3))
    return (np.stack([np.asarray(each) for each in smooth]) + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("shape", ["squash", "letterbox"])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_graph_does_what_training_does(size: tuple[int, int], fixed: bool, shape: Shape, outputs: int) -> None:
    torch.manual_seed(1)
    network, frame = UNet(4, 2, out_channels=outputs).eval(), Frame(32, shape)
    graph = Deployable(network, frame, max(2, outputs), size if fixed else None).eval()
    images = pictures(2, *size)
    with torch.no_grad():
        masks, probabilities = graph(torch.from_numpy(images), None if fixed else torch.tensor(size))
    logits = by_pil(network, images, frame)
    expected = logits.sigmoid() if outputs == 1 else logits.softmax(1)
    expected = 1 - expected[:, :1] if outputs == 2 else expected
    assert masks.dtype == torch.uint8 and masks.shape == (2, *size)
    assert (probabilities - expected).abs().max() < 1e-5
    drawn = logits[:, 0] > 0 if outputs == 1 else logits.argmax(1)
    best = logits.abs()[:, 0] if outputs == 1 else logits.topk(2, dim=1).values.diff(dim=1).abs()[:, 0]
    assert torch.equal(masks[best > 1e-4], drawn.to(torch.uint8)[best > 1e-4])
    assert len(masks.unique()) > 1, "the network says the same of everything, which tests nothing"


@pytest.mark.parametrize(("scale", "size"), [(1.0, (32, 32)), (1.0, (30, 21)), (0.4, (57, 71))])
def test_crops_are_graphs_of_one_tile(scale: float, size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    network, frame = UNet(4, 2).eval(), Frame(32, "crop", scale)
    images = pictures(1, *size)
    with torch.no_grad():
        _, probabilities = Deployable(network, frame, 2, size).eval()(torch.from_numpy(images))
    assert (probabilities - by_pil(network, images, frame).sigmoid()).abs().max() < 1e-5


@pytest.mark.parametrize("shape", ["squash", "letterbox"])
@pytest.mark.parametrize("size", [(517, 1031), (640, 800)])
def test_jpegs_that_are_decoded_at_a_part_of_their_size(shape: Shape, size: tuple[int, int], tmp_path: Path) -> None:
    network, frame = UNet(4, 2).eval(), Frame(32, shape)
    Image.fromarray(pictures(1, *size)[0]).save(tmp_path / "a.jpg", quality=95)
    pixels, own = read_reduced(tmp_path / "a.jpg", frame)
    canvas, _ = read_canvas(tmp_path / "a.jpg", frame)
    assert own == size and pixels.shape[1] == -(-size[1] // 8)
    graph = Deployable(network, frame, 2, None).eval()
    rows, columns = graph._sides(torch.from_numpy(pixels[None]), torch.tensor(own))
    actual = graph._canvas(torch.from_numpy(pixels[None]), rows, columns)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(actual, (canvas / 255 - CHANNEL_MEANS) / CHANNEL_DEVIATIONS, atol=1e-5)
    with torch.no_grad():
        masks, _ = graph(torch.from_numpy(pixels[None]), torch.tensor(own))
    assert masks.shape == (1, *size)


def test_tiles_are_no_graph() -> None:
    network = UNet(4, 2)
    with pytest.raises(UserError, match=r"cut into tiles, which a graph does not do; export at a fixed size .* 32x32"):
        Deployable(network, Frame(32, "crop"), 2, None)
    with pytest.raises(UserError, match=r"--size 33x20: under data.shape crop this takes more than one tile"):
        Deployable(network, Frame(32, "crop"), 2, (33, 20))
