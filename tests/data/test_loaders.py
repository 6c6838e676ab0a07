"""Both loaders against one contract, and against each other."""

import importlib
import importlib.util
import threading
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import max_pool2d

from distseg.data.augment import Transform, draw_transform, identity_transform
from distseg.data.batch import Request
from distseg.data.config import AugmentConfig
from distseg.data.decode import Decoding, read_image, read_mask, read_resized_image
from distseg.data.geometry import Frame
from distseg.data.reader import PixelReader
from distseg.data.resize import resize_mask
from distseg.data.sample import Annotation, Sample
from distseg.errors import UserError

CPU = torch.device("cpu")
STRONG = AugmentConfig(flip=True, right_angles=True, rotate=180, scale=(0.5, 2), shear=20, translate=0.3)
COLOURED = STRONG.model_copy(update={"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 40.0})
EVERYTHING = COLOURED.model_copy(update={"elastic": 0.05, "hairs": 12, "blur": 1.5, "grain": 0.05})
SIZE = 32
AS_STORED = np.eye(3, 4, dtype=np.float32)  # a colour map that hands the bytes through


needs_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="DALI is not installed")


@pytest.fixture(params=["torch_loader", pytest.param("dali", marks=needs_dali)])
def load_batches(request):
    return importlib.import_module(f"distseg.data.{request.param}").load_batches


def blob(height: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    centre = (int(width * rng.uniform(0.35, 0.65)), int(height * rng.uniform(0.35, 0.65)))
    return cv2.ellipse(mask, centre, (width // 4, height // 6), float(rng.uniform(0, 180)), 0, 360, 1, -1)


def write_sample(folder: Path, name: str, image: np.ndarray, mask: np.ndarray, noisy: np.ndarray | None = None):
    """Lossless files: `image` (H, W, 3) RGB, masks (H, W) as they are."""
    paths = {"image": image[..., ::-1], "mask": mask} | ({} if noisy is None else {"noisy_mask": noisy})
    for kind, pixels in paths.items():
        assert cv2.imwrite(str(folder / f"{name}_{kind}.png"), pixels)
    image_file, mask_file, noisy_file = (folder / f"{name}_{kind}.png" for kind in ("image", "mask", "noisy_mask"))
    return Sample(name, "train", image_file, mask_file, (Annotation("", noisy_file),) if noisy is not None else ())


def noise_image(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def load_one(load_batches, sample: Sample, transform: Transform, size: int = SIZE, labels: str = "true"):
    (batch,) = load_batches(iter([[Request.of(sample, labels, transform)]]), PixelReader(Frame(size)), 1, CPU, 1)
    return batch


def with_bytes(transform: Transform) -> Transform:
    return replace(transform, colour=AS_STORED)


# --- contract ---------------------------------------------------------------------------------------------------------


def test_shapes_types_ids_and_a_clean_end(load_batches, tmp_path):
    samples = [write_sample(tmp_path, f"s{n}", noise_image(40 + n, 50, n), blob(40 + n, 50, n) * 255) for n in range(7)]
    cuts = [samples[:3], samples[3:4], samples[4:6], samples[6:]]
    requests = ([Request.of(s, "true", identity_transform(SIZE)) for s in cut] for cut in cuts)
    batches = list(load_batches(requests, PixelReader(Frame(SIZE)), 3, CPU, 2))
    assert [batch.ids for batch in batches] == [("s0", "s1", "s2"), ("s3",), ("s4", "s5"), ("s6",)]
    for batch in batches:
        count = len(batch.ids)
        assert (batch.images.shape, batch.images.dtype) == ((count, 3, SIZE, SIZE), torch.float32)
        assert (batch.masks.shape, batch.masks.dtype) == ((count, SIZE, SIZE), torch.uint8)
        assert batch.images.is_contiguous() and batch.masks.is_contiguous()
        assert batch.true_masks is batch.masks
    assert list(load_batches(iter([]), PixelReader(Frame(SIZE)), 3, CPU, 1)) == []


def test_prefetching_keeps_every_sample_with_its_own_masks(load_batches, tmp_path):
    # Image, label and true mask all spell the sample's number: a mix-up of any two would show.
    def written_in(number: int, bits: int) -> np.ndarray:
        mask = np.zeros((SIZE, SIZE), np.uint8)
        for bit in range(bits):
            mask[:, 4 * bit : 4 * bit + 4] = number >> bit & 1
        return mask

    samples = [
        write_sample(
            tmp_path,
            f"{n}",
            np.full((SIZE, SIZE, 3), 5 * n, np.uint8),
            written_in(n, 6),
            written_in(n, 6) ^ 1 if n % 2 else None,
        )
        for n in range(40)
    ]
    order = np.random.default_rng(0).integers(0, 40, 120)
    requests = (
        [Request.of(samples[n], "noisy", with_bytes(identity_transform(SIZE))) for n in order[first : first + 5]]
        for first in range(0, 120, 5)
    )
    seen = []
    kept = list(
        load_batches(requests, PixelReader(Frame(SIZE)), 5, CPU, 2)
    )  # kept, so that a reused buffer would show too
    for batch in kept:
        for image, mask, true, id in zip(batch.images, batch.masks, batch.true_masks, batch.ids, strict=True):
            number = int(id)
            assert torch.all(image == 5 * number)
            np.testing.assert_array_equal(true.numpy(), written_in(number, 6))
            np.testing.assert_array_equal(mask.numpy(), written_in(number, 6) ^ (number % 2))
            seen.append(number)
    assert seen == order.tolist()


def test_labels_true_ignores_the_noisy_mask(load_batches, tmp_path):
    mask = blob(SIZE, SIZE, 0)
    sample = write_sample(tmp_path, "s", noise_image(SIZE, SIZE, 0), mask, 1 - mask)
    batch = load_one(load_batches, sample, identity_transform(SIZE), labels="true")
    assert batch.true_masks is batch.masks
    np.testing.assert_array_equal(batch.masks[0].numpy(), mask)


def test_closing_early_stops_the_loader(load_batches, tmp_path):
    sample = write_sample(tmp_path, "s", noise_image(SIZE, SIZE, 0), blob(SIZE, SIZE, 0))
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield [Request.of(sample, "true", identity_transform(SIZE))]

    before = threading.active_count()
    batches = load_batches(endless(), PixelReader(Frame(SIZE)), 1, CPU, 1)
    next(batches)
    batches.close()
    assert len(taken) < 10
    assert threading.active_count() <= before


# --- masks ------------------------------------------------------------------------------------------------------------


def test_every_binary_encoding_becomes_zero_and_one(load_batches, tmp_path):
    mask = blob(SIZE, SIZE, 3)
    pixels = noise_image(SIZE, SIZE, 3)
    samples = [write_sample(tmp_path, f"s{value}", pixels, mask * value) for value in (1, 255)]
    encodings = {
        "bit": Image.fromarray(mask * 255).convert("1"),
        "rgb": Image.fromarray(np.repeat(mask[..., None] * 255, 3, axis=2)),
    }
    for name, palette in [("red", [0, 0, 0, 128, 0, 0]), ("dim", [0, 0, 0, 1, 1, 1])]:
        encodings[name] = Image.frombytes("P", mask.shape, mask.tobytes())
        encodings[name].putpalette(palette)
    for name, image in encodings.items():
        image.save(tmp_path / f"{name}.png")
        samples.append(Sample(name, "train", samples[0].image, tmp_path / f"{name}.png"))
    request = [Request.of(sample, "true", identity_transform(SIZE)) for sample in samples]
    (batch,) = load_batches(iter([request]), PixelReader(Frame(SIZE)), len(samples), CPU, 1)
    for actual in batch.masks:
        np.testing.assert_array_equal(actual.numpy(), mask)


def test_masks_stay_zero_and_one_and_move_with_the_image(load_batches, tmp_path):
    # The mask is painted into the image; after any transform the image, cut at half, must be the mask again, but for
    # interpolation at its edge: nearest neighbour is off by up to half a source pixel, here 1.3 pixels at zoom 2.
    samples = []
    for number in range(5):
        mask = blob(60, 50, number)
        samples.append(write_sample(tmp_path, f"s{number}", np.repeat(mask[..., None] * 255, 3, axis=2), mask * 255))
    requests = [
        [Request.of(samples[n % 5], "true", with_bytes(draw_transform(STRONG, 64, 0, "s", n)))] for n in range(300)
    ]
    disagreeing, edge, lit = 0, 0, 0
    for batch in load_batches(iter(requests), PixelReader(Frame(64)), 1, CPU, 2):
        mask = batch.masks[0].numpy()
        assert set(np.unique(mask)) <= {0, 1}
        painted = (batch.images[0, 0].numpy() > 127).astype(np.uint8)
        near_edge = cv2.dilate(mask, np.ones((7, 7))) != cv2.erode(mask, np.ones((7, 7)))
        assert not ((painted != mask) & ~near_edge).any()
        outline = mask != cv2.erode(mask, np.ones((3, 3)))
        disagreeing, edge, lit = disagreeing + np.sum(painted != mask), edge + outline.sum(), lit + mask.sum()
    assert lit > 100_000
    assert disagreeing < 0.25 * edge


def board(number: int) -> np.ndarray:
    """4×4 cells of 16 pixels, lit or not at random: no flip or turn of one looks like another."""
    return np.kron(np.random.default_rng(number).integers(0, 2, (4, 4), np.uint8), np.ones((16, 16), np.uint8))


@pytest.mark.parametrize(
    ("elastic", "count", "margin", "differing"),
    [(0.0, 10_000, 0, 0.002), (0.05, 2_000, 2, 0.05)],
    ids=["affine", "elastic"],
)
def test_ten_thousand_pairs_stay_aligned_binary_and_finite(load_batches, tmp_path, elastic, count, margin, differing):
    """A board is painted into image and mask; the image, cut at half, must be the mask again.

    They may differ in a share `differing` of the band of two pixels along the mask's edges and nowhere else: nearest
    neighbour and linear interpolation round differently, and with an elastic deformation twice in a row; the edge may
    then also lie outside the picture, hence the margin.
    """
    config = STRONG.model_copy(update={"scale": (0.7, 1.5), "elastic": elastic})
    samples = []
    for number in range(20):
        mask = board(number)
        samples.append(write_sample(tmp_path, f"s{number}", np.repeat(mask[..., None] * 255, 3, axis=2), mask * 255))
    requests = (
        [
            Request.of(samples[n % 20], "true", with_bytes(draw_transform(config, 64, 1, "s", n)))
            for n in range(m, m + 100)
        ]
        for m in range(0, count, 100)
    )
    pairs, wrong_pixels, edge = 0, 0, 0
    inner = slice(margin, 64 - margin)
    for batch in load_batches(requests, PixelReader(Frame(64), 2**24), 100, CPU, 2):
        assert torch.isfinite(batch.images).all()
        assert batch.masks.max() == 1
        masks = batch.masks.float()[:, None]
        in_band = max_pool2d(masks, 5, 1, 2) != -max_pool2d(-masks, 5, 1, 2)
        wrong = (batch.images[:, :1] > 127) != (masks > 0)
        assert not (wrong & ~in_band)[..., inner, inner].any()
        pairs, wrong_pixels, edge = pairs + len(masks), wrong_pixels + wrong.sum(), edge + in_band.sum()
    assert pairs == count
    assert wrong_pixels < differing * edge


def test_colours_hairs_blur_and_grain_leave_the_masks_alone(load_batches, tmp_path):
    samples = [write_sample(tmp_path, f"s{n}", noise_image(SIZE, SIZE, n), blob(SIZE, SIZE, n)) for n in range(8)]
    batches = []
    for config in (STRONG, EVERYTHING.model_copy(update={"elastic": 0.0})):
        requests = [Request.of(samples[n % 8], "true", draw_transform(config, SIZE, 0, "s", n)) for n in range(400)]
        batches += load_batches(iter([requests]), PixelReader(Frame(SIZE)), 400, CPU, 2)
    plain, changed = batches
    assert torch.isfinite(changed.images).all()
    assert torch.equal(plain.masks, changed.masks)
    assert (plain.images != changed.images).float().mean() > 0.99


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 33])
def test_right_angles_and_flips_permute_the_pixels_exactly(load_batches, tmp_path, size):
    pixels, mask = noise_image(size, size, 1), noise_image(size, size, 2)[..., 0] % 2
    sample = write_sample(tmp_path, "s", pixels, mask)
    config = AugmentConfig(flip=True, right_angles=True)
    transforms = [with_bytes(draw_transform(config, size, 0, "s", position)) for position in range(40)]
    requests = [Request.of(sample, "true", transform) for transform in transforms]
    (batch,) = load_batches(iter([requests]), PixelReader(Frame(size)), len(requests), CPU, 1)
    row, column = np.mgrid[:size, :size] + 0.5
    for image, label, transform in zip(batch.images, batch.masks, transforms, strict=True):
        x, y = np.floor(np.tensordot(transform.matrix, np.stack([column, row, np.ones_like(row)]), 1)).astype(int)
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels[y, x])
        np.testing.assert_array_equal(label.numpy(), mask[y, x])


@pytest.mark.parametrize(
    ("linear", "expected"),
    [
        ([[-1, 0, SIZE], [0, 1, 0]], lambda pixels: pixels[:, ::-1]),
        ([[1, 0, 0], [0, -1, SIZE]], lambda pixels: pixels[::-1]),
        ([[0, -1, SIZE], [1, 0, 0]], lambda pixels: np.rot90(pixels)),
        ([[1, 0, 3], [0, 1, -2]], lambda pixels: np.pad(pixels, ((2, 0), (0, 3), (0, 0)))[:SIZE, 3:]),
    ],
    ids=["mirror", "upside down", "quarter turn", "shift with black fill"],
)
def test_matrix_maps_destination_to_source_from_the_corner(load_batches, tmp_path, linear, expected):
    pixels = noise_image(SIZE, SIZE, 4)
    mask = pixels[..., 0] % 2
    sample = write_sample(tmp_path, "s", pixels, mask)
    batch = load_one(load_batches, sample, Transform(np.array(linear, np.float32), AS_STORED))
    np.testing.assert_array_equal(batch.images[0].permute(1, 2, 0).numpy(), expected(pixels))
    np.testing.assert_array_equal(batch.masks[0].numpy(), expected(mask[..., None])[..., 0])


def test_half_a_pixel_averages_neighbours(load_batches, tmp_path):
    pixels = 2 * (noise_image(SIZE, SIZE, 5) // 2)
    sample = write_sample(tmp_path, "s", pixels, pixels[..., 0] * 0)
    matrix = np.array([[1, 0, 0.5], [0, 1, 0]], np.float32)
    actual = load_one(load_batches, sample, Transform(matrix, AS_STORED)).images[0].permute(1, 2, 0).numpy()
    expected = (pixels[:, :-1].astype(float) + pixels[:, 1:]) / 2
    np.testing.assert_allclose(actual[:, :-1], expected, atol=1e-6)


def test_colour_map_is_applied_after_the_geometry(load_batches, tmp_path):
    pixels = noise_image(SIZE, SIZE, 6)
    sample = write_sample(tmp_path, "s", pixels, pixels[..., 0] % 2)
    transform = draw_transform(COLOURED, SIZE, 0, "s", 1)
    geometry = load_one(load_batches, sample, with_bytes(transform)).images[0].double()
    expected = np.tensordot(transform.colour[:, :3], geometry.numpy(), 1) + transform.colour[:, 3, None, None]
    actual = load_one(load_batches, sample, transform).images[0].numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert np.any(geometry.numpy().sum(axis=0) == 0)  # the fill is black before the colours are mapped


UPRIGHT = {  # what a viewer does to the stored pixels (EXIF 2.32, orientation)
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("tag", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_orientation_is_applied_or_ignored_for_image_and_mask_alike(load_batches, tmp_path, format, tag):
    pixels, mask = cv2.GaussianBlur(noise_image(20, 30, 7), (0, 0), 2), blob(20, 30, 0)
    exif = Image.Exif()
    exif[0x0112] = tag
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(format, {})
    Image.fromarray(pixels).save(tmp_path / "turned.image", format, exif=exif, **lossless)
    Image.fromarray(mask).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "plain.image", format, **lossless)
    plain = read_image(tmp_path / "plain.image")
    turned = Sample("turned", "train", tmp_path / "turned.image", tmp_path / "turned.png")
    for orientation, upright in (("apply", UPRIGHT.get(tag, UPRIGHT[1])), ("ignore", UPRIGHT[1])):
        decoding = Decoding(orientation)
        np.testing.assert_array_equal(read_image(turned.image, decoding), upright(plain))
        np.testing.assert_array_equal(read_mask(turned.truth, decoding), upright(mask))
        request = [[Request.of(turned, "true", with_bytes(identity_transform(16)))]]
        (batch,) = load_batches(iter(request), PixelReader(Frame(16), decoding=decoding), 1, CPU, 1)
        square = read_resized_image(tmp_path / "plain.image", Frame(16))
        np.testing.assert_array_equal(batch.images[0].permute(1, 2, 0).numpy(), upright(square))
        np.testing.assert_array_equal(batch.masks[0].numpy(), upright(resize_mask(mask, 16, 16)))


def test_reduction_is_antialiased_and_masks_are_not(load_batches, tmp_path):
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 200
    mask = blob(256, 256, 0)
    sample = write_sample(tmp_path, "s", stripes, mask)
    batch = load_one(load_batches, sample, with_bytes(identity_transform(16)), size=16)
    assert batch.images[..., 1:-1].sub(100).abs().max() < 5
    np.testing.assert_array_equal(batch.masks[0].numpy(), mask.reshape(16, 16, 16, 16).mean(axis=(1, 3)) > 0.5)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "reference", "annotation"])
@pytest.mark.parametrize("content", [None, b"", b"<html>404</html>"], ids=["missing", "empty", "no image"])
def test_a_file_that_breaks_during_training_is_named(load_batches, tmp_path, kind, content):
    samples = [
        write_sample(tmp_path, f"s{n}", noise_image(SIZE, SIZE, n), blob(SIZE, SIZE, n), blob(SIZE, SIZE, n))
        for n in range(6)
    ]
    path = samples[3].files[kind]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    requests = [[Request.of(s, "noisy", identity_transform(SIZE)) for s in samples[i : i + 2]] for i in (0, 2, 4)]
    with pytest.raises(UserError) as raised:
        list(load_batches(iter(requests), PixelReader(Frame(SIZE)), 2, CPU, 1))
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


# --- parity -----------------------------------------------------------------------------------------------------------


def both(samples: list[Sample], size: int, config: AugmentConfig, colour: bool):
    from distseg.data import dali, torch_loader

    transforms = [draw_transform(config, size, 0, "s", n) for n in range(8 * len(samples))]
    requests = [
        Request.of(samples[n % len(samples)], "noisy", t if colour else with_bytes(t)) for n, t in enumerate(transforms)
    ]
    return [
        next(load_batches(iter([requests]), PixelReader(Frame(size)), len(requests), CPU, 1))
        for load_batches in (dali.load_batches, torch_loader.load_batches)
    ]


@needs_dali
def test_parity_at_the_files_own_size(tmp_path):
    """Within one of 255 grey levels, from rounding; colours within the float32 error of a 3×4 product."""
    samples = [
        write_sample(tmp_path, f"s{n}", noise_image(SIZE, SIZE, n), blob(SIZE, SIZE, n), blob(SIZE, SIZE, n + 9))
        for n in range(4)
    ]
    dali, torch_ = both(samples, SIZE, STRONG, colour=False)
    assert (dali.images - torch_.images).abs().max() <= 1
    # A source coordinate on the border of two pixels may round to either side.
    for name in ("masks", "true_masks"):
        assert (getattr(dali, name) != getattr(torch_, name)).float().mean() < 1e-3
    assert torch.any(dali.masks != dali.true_masks)
    dali, torch_ = both(samples, SIZE, AugmentConfig(brightness=0.2, hue=20, flip=True), colour=True)
    torch.testing.assert_close(dali.images, torch_.images, rtol=0, atol=1e-4)


@needs_dali
@pytest.mark.parametrize("size", [24, 64, 160])
def test_parity_with_resizing(tmp_path, size):
    """The antialiasing filters differ a little: on smooth pictures by at most 3 grey levels, a third on average."""
    samples = []
    for number in range(4):
        pixels = cv2.GaussianBlur(noise_image(120, 140, number), (0, 0), 6)
        pixels = cv2.normalize(pixels, None, 0, 255, cv2.NORM_MINMAX)
        samples.append(write_sample(tmp_path, f"s{number}", pixels, blob(120, 140, number)))
    dali, torch_ = both(samples, size, STRONG, colour=False)
    difference = (dali.images - torch_.images).abs()
    assert difference.max() <= 3
    assert difference.mean() < 0.34
    assert (dali.masks != torch_.masks).float().mean() < 1e-3


@needs_dali
@pytest.mark.parametrize("key", ["elastic", "hairs", "blur", "grain"])
def test_parity_of_each_effect(tmp_path, key):
    """Of 255 grey levels: one, from rounding, after an elastic deformation; a thousandth where all is in float."""
    samples = [write_sample(tmp_path, f"s{n}", noise_image(SIZE, SIZE, n), blob(SIZE, SIZE, n)) for n in range(4)]
    config = AugmentConfig(**{key: getattr(EVERYTHING, key)})
    dali, torch_ = both(samples, SIZE, config, colour=False)
    plain, _ = both(samples, SIZE, AugmentConfig(), colour=False)
    assert (dali.images - plain.images).abs().mean() > (0.01 if key == "grain" else 1)
    assert (dali.images - torch_.images).abs().max() < (1.001 if key == "elastic" else 1e-3)
    assert torch.equal(dali.masks, torch_.masks)


@needs_dali
def test_parity_of_everything_together(tmp_path):
    """In deviations of the input: a grey level is 0.025."""
    samples = []
    for number in range(4):
        pixels = cv2.GaussianBlur(noise_image(90, 70, number), (0, 0), 3)
        samples.append(write_sample(tmp_path, f"s{number}", pixels, blob(90, 70, number)))
    dali, torch_ = both(samples, SIZE, EVERYTHING, colour=True)
    assert (dali.images - torch_.images).abs().max() < 0.1
    assert (dali.images - torch_.images).abs().mean() < 0.01
    assert (dali.masks != torch_.masks).float().mean() < 1e-3


# --- reading ----------------------------------------------------------------------------------------------------------


def test_reduced_decoding_of_a_jpeg_is_within_grey_levels_of_full_decoding(tmp_path):
    pixels = cv2.GaussianBlur(noise_image(700, 900, 0), (0, 0), 9)
    pixels = cv2.normalize(pixels, None, 0, 255, cv2.NORM_MINMAX)
    Image.fromarray(pixels).save(tmp_path / "large.jpg", quality=95)
    Image.fromarray(read_image(tmp_path / "large.jpg")).save(tmp_path / "large.png")  # decoded at full size
    reduced, full = (
        read_resized_image(tmp_path / f"large.{suffix}", Frame(64)).astype(int) for suffix in ("jpg", "png")
    )
    assert np.abs(reduced - full).max() <= 3
    assert np.abs(reduced - full).mean() < 0.5


def test_what_is_kept_in_memory_stays_within_its_budget_and_changes_no_bit(load_batches, tmp_path):
    samples = [write_sample(tmp_path, f"s{n}", noise_image(50, 60, n), blob(50, 60, n)) for n in range(6)]
    requests = [[Request.of(s, "true", draw_transform(COLOURED, SIZE, 0, "s", n)) for n, s in enumerate(samples)]] * 3
    one = SIZE * SIZE * (3 + 1)
    readers = {budget: PixelReader(Frame(SIZE), budget * one) for budget in (0, 2, 100)}
    batches = {b: list(load_batches(iter(requests), reader, 6, CPU, 2)) for b, reader in readers.items()}
    for budget, reader in readers.items():
        assert reader.kept_bytes <= budget * one
        for actual, expected in zip(batches[budget], batches[0], strict=True):
            assert torch.equal(actual.images, expected.images) and torch.equal(actual.masks, expected.masks)
    assert readers[100].kept_bytes == 6 * one
    for sample in samples:
        sample.image.unlink()
    for actual in load_batches(iter(requests), readers[100], 6, CPU, 2):
        assert torch.equal(actual.images, batches[0][0].images)
