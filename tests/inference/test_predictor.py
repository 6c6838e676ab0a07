"""The core: logits in strips are those of whole images, whatever the shape, the size and the symmetries."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from distseg.data.decode import read_resized_image
from distseg.data.geometry import Frame
from distseg.evaluation.own_resolution import at_own_resolution, own_strips
from distseg.evaluation.tiles import predict_by_tiles
from distseg.inference.predictor import Predictor, Settings

CPU = torch.device("cpu")


@pytest.mark.parametrize("frame", [Frame(16), Frame(16, "letterbox"), Frame(16, "crop", 0.4), Frame(16, "crop", 1.7)])
@pytest.mark.parametrize("size", [(16, 16), (7, 40), (61, 35), (33, 90)])
def test_strips_of_bands_are_torchs_interpolation(frame: Frame, size: tuple[int, int]) -> None:
    place = frame.place(*size)
    logits = torch.randn(2, *place.canvas, generator=torch.Generator().manual_seed(0))
    rows, columns = place.picture
    # Torch computes positions in float32, 1e-6 off for each pixel of a side; neighbours differ by about 1.
    expected = interpolate(logits[None, :, rows, columns], size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(at_own_resolution(logits, place, *size), expected, rtol=0, atol=2e-4)
    for cut in (1, 5, place.canvas[0] - 1):
        strips = list(own_strips(iter(logits.split(cut, dim=1)), place, *size))
        torch.testing.assert_close(torch.cat(strips, dim=1), expected, rtol=0, atol=2e-4)


def write_picture(path: Path, height: int, width: int) -> Path:
    coarse = np.random.default_rng(height).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
    return path


@pytest.mark.parametrize("scale", [1.0, 0.6, 1.5])
@pytest.mark.parametrize("size", [(20, 90), (75, 101)])
def test_crops_equal_the_whole_canvas_by_tiles(
    make_run: Callable, tmp_path: Path, scale: float, size: tuple[int, int]
) -> None:
    run = make_run("data.shape=crop", f"data.scale={scale}")
    path = write_picture(tmp_path / "p.png", *size)
    predictor = Predictor.of_run(run, CPU, Settings(batch_size=3))
    [strips] = predictor.strips([predictor.read(path)])
    actual = torch.cat(list(strips), dim=1)

    frame = predictor.data.frame
    canvas = read_resized_image(path, frame)
    image = torch.from_numpy(cv2.transform(canvas.astype(np.float32), predictor.read(path)._colour)).permute(2, 0, 1)
    with torch.no_grad():
        whole = predict_by_tiles(predictor.network, image[None].contiguous(), 32, 0.25, 3)[0]
    expected = at_own_resolution(whole, frame.place(*size), *size)
    assert actual.shape == (1, *size)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)  # torch enlarges by float32 positions


@pytest.mark.parametrize(("flips", "right_angles", "count"), [(True, False, 4), (False, True, 4), (True, True, 8)])
def test_symmetries_are_averaged_and_turned_back(
    make_run: Callable, tmp_path: Path, flips: bool, right_angles: bool, count: int
) -> None:
    run, path = make_run(), write_picture(tmp_path / "p.png", 32, 32)
    plain = Predictor.of_run(run, CPU)
    averaged = Predictor.of_run(run, CPU, Settings(flips=flips, right_angles=right_angles))
    image = torch.from_numpy(plain.read(path).tile(0, 0))[None]
    turns, mirrors = range(4 if right_angles else 1), [[], [2], [3], [2, 3]] if flips else [[]]
    seen: dict[bytes, torch.Tensor] = {}
    with torch.no_grad():
        for turn in turns:
            for mirror in mirrors:
                shown = torch.rot90(image.flip(mirror), turn, (2, 3)).contiguous()
                seen[shown.numpy().tobytes()] = torch.rot90(plain.network(shown), -turn, (2, 3)).flip(mirror)
    assert len(seen) == count
    expected = torch.stack(list(seen.values())).mean(dim=0)
    torch.testing.assert_close(averaged._logits(image), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(plain._logits(image), expected, atol=1e-3)


def test_confidence_areas_and_what_is_not_finite(make_run: Callable, tmp_path: Path) -> None:
    run, path = make_run("data.shape=letterbox"), write_picture(tmp_path / "p.png", 32, 20)
    predictor = Predictor.of_run(run, CPU)
    [prediction] = predictor.predict([predictor.read(path)])
    [strips] = predictor.strips([predictor.read(path)])
    probability = torch.cat(list(strips), dim=1)[0].sigmoid()
    assert prediction.confidence == pytest.approx(torch.maximum(probability, 1 - probability).mean().item(), abs=1e-6)
    assert prediction.areas == ((prediction.mask == 0).sum(), (prediction.mask == 1).sum())
    torch.nn.init.constant_(predictor.network.head.bias, float("nan"))
    with pytest.raises(Exception, match="not finite"):
        list(predictor.predict([predictor.read(path)]))
