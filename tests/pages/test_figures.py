import subprocess
import sys

import numpy as np
import pytest
import torch

from distseg.pages.figures import (
    bar_chart,
    comparison_figure,
    contact_sheet,
    curves,
    line_charts,
    panel,
    save_png,
)

SIDE = 32
BLUE = (0, 0, 255)


def samples(count: int):
    """Blue images whose true mask is the upper left quarter and whose noisy mask is the lower right one."""
    images = torch.zeros(count, 3, SIDE, SIDE)
    images[:, 2] = 1
    true = torch.zeros(count, SIDE, SIDE, dtype=torch.uint8)
    true[:, 4:16, 4:16] = 1
    noisy = torch.zeros_like(true)
    noisy[:, 16:28, 16:28] = 1
    return images, noisy, true


def tiles(picture: np.ndarray) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Where the all-blue tiles of the first row lie: their left and right ends, and the row's top and bottom."""
    blue = (picture == BLUE).all(axis=2)
    ends = np.flatnonzero(np.diff(blue.sum(axis=0) > 20, prepend=False, append=False))
    lines = np.flatnonzero(np.diff(blue.sum(axis=1) > 20, prepend=False, append=False))
    return list(zip(ends[::2], ends[1::2], strict=True)), (lines[0], lines[1])


def test_panel_grows_by_rows_up_to_six():
    heights = []
    for count in (1, 2, 6, 7):
        images, noisy, true = samples(count)
        weights = torch.full((count, SIDE, SIDE), 1 / (count * SIDE**2))
        picture = panel(images, noisy, true, weights, true.float(), caption="step 10")
        assert picture.dtype == np.uint8
        assert picture.ndim == 3
        assert picture.shape[2] == 3
        heights.append(picture.shape[0])

    one, two, six, seven = heights
    assert six - two == pytest.approx(4 * (two - one), abs=4)  # whole pixels
    assert seven == six


def test_panel_draws_each_mask_in_its_column_and_the_prediction_where_it_is():
    images, noisy, true = samples(1)
    prediction = true.float()

    picture = panel(images, noisy, true, torch.rand(1, SIDE, SIDE), prediction, caption="")

    (image, with_noisy, with_true, *_), (top, bottom) = tiles(picture)
    side, pitch = image[1] - image[0], with_noisy[0] - image[0]

    def centre_of(colour, left):
        tile = picture[top:bottom, left : left + side].astype(int)
        rows, columns = np.nonzero(np.abs(tile - colour).sum(axis=2) < 30)
        return (rows.min() + rows.max()) / 2 / side * SIDE, (columns.min() + columns.max()) / 2 / side * SIDE

    assert centre_of((240, 228, 66), with_noisy[0]) == pytest.approx((22, 22), abs=0.5)
    assert centre_of((86, 180, 233), with_true[0]) == pytest.approx((10, 10), abs=0.5)

    left = image[0] + 3 * pitch  # wrong are the pixels of one mask and not of the other: both squares
    wrong = picture[top:bottom, left : left + side].mean(axis=2) > 128
    assert wrong.mean() == pytest.approx(2 * 12**2 / SIDE**2, abs=0.02)

    left = image[0] + 5 * pitch
    tile = picture[top:bottom, left : left + side]
    inner = slice(side * 7 // SIDE, side * 13 // SIDE)
    outer = slice(side * 19 // SIDE, side * 30 // SIDE)
    assert (tile[inner, inner] == 255).all()
    assert (tile[outer, outer] == 0).all()


def test_panel_shows_weights_relative_to_their_own_row():
    images, noisy, true = samples(2)
    weights = torch.zeros(2, SIDE, SIDE)
    weights[0, :, 24:] = 1e-5
    weights[1, :, 24:] = 1e-8

    picture = panel(images, noisy, true, weights, true.float(), caption="")

    (image, with_noisy, *_), (top, bottom) = tiles(picture)
    side, left = image[1] - image[0], image[0] + 4 * (with_noisy[0] - image[0])
    rows = np.flatnonzero(np.diff((picture == BLUE).all(axis=2).sum(axis=1) > 20, prepend=False, append=False))
    inside = slice(left + side * 29 // SIDE, left + side * 31 // SIDE)
    first, second = (picture[start + side // 4 : start + side // 2, inside] for start in (rows[0], rows[2]))
    assert first.mean() > 200  # magma's bright end
    assert (first == second).all()
    assert picture[top + side // 2 : bottom - 5, left + 5 : left + side // 4].mean() < 20


def test_panel_survives_ignored_pixels_empty_masks_and_no_weight():
    images, noisy, true = samples(2)
    noisy[0] = 255
    true[:] = 0
    nothing = torch.zeros(2, SIDE, SIDE)

    picture = panel(images, noisy, true, nothing, nothing, caption="all ignored")

    (image, *_), (top, bottom) = tiles(picture)
    second = image[0] + (image[1] - image[0]) * 3 // 2
    greyed = picture[(top + bottom) // 2, second]
    assert tuple(greyed) != BLUE


RUNS = {
    "noisy_only": [{"step": 1, "train/loss": 0.7}, {"step": 5, "val/dice": 0.3}, {"step": 10, "val/dice": 0.4}],
    "pixel_reweight": [{"step": 5, "val/dice": None}, {"step": 10, "val/dice": 0.8}],
}


def has_colour(picture, colour):
    return (np.abs(picture.astype(int) - colour).sum(axis=2) < 12).any()


def test_curves_draw_a_line_per_run_and_nothing_for_a_run_without_validation():
    first, second = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)

    both, one = curves(RUNS), curves({**RUNS, "pixel_reweight": [{"step": 1, "train/loss": 0.7}]})

    assert has_colour(both, first)
    assert has_colour(both, second)
    assert has_colour(one, first)
    assert not has_colour(one, second)
    assert curves({}).shape[2] == 3


def test_where_names_outnumber_colours_markers_tell_them_apart():
    names = [f"method {letter}" for letter in "abcdefghijkl"]

    def chart(drawn: str) -> np.ndarray:
        series = {name: [(0.0, 0.5, 0.0)] if name == drawn else [] for name in names}
        return line_charts({"K": series}, "x", "y")[:, :400]  # without the legend

    first, eleventh = chart(names[0]), chart(names[10])
    assert has_colour(first, (0x00, 0x72, 0xB2)) and has_colour(eleventh, (0x00, 0x72, 0xB2))
    assert (first != eleventh).any()


def test_comparison_has_a_column_per_method():
    images, noisy, true = samples(2)
    runs = {**RUNS, "oracle": []}

    two = comparison_figure(RUNS, images, noisy, true, dict.fromkeys(RUNS, true > 0))
    three = comparison_figure(runs, images, noisy, true, dict.fromkeys(runs, noisy > 0))

    (_, second, third, *_), _ = tiles(two[300:])
    assert three.shape[1] - two.shape[1] == pytest.approx(third[0] - second[0], abs=2)
    assert three.shape[0] == two.shape[0]


def test_png_round_trip_leaves_nothing_beside_it(tmp_path):
    from matplotlib.image import imread

    picture = np.random.default_rng(0).integers(0, 256, size=(8, 9, 3), dtype=np.uint8)
    path = tmp_path / "figure.png"
    path.write_text("an older figure")

    save_png(picture, path)

    assert (np.round(imread(path)[..., :3] * 255) == picture).all()
    assert list(tmp_path.iterdir()) == [path]


def test_the_module_imports_without_matplotlib():
    code = "import sys, distseg.pages.figures; sys.exit('matplotlib' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_contact_sheet_has_a_column_a_level_and_draws_each_levels_contour():
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[..., 2] = 255
    true, noisy = np.zeros((2, SIDE, SIDE), np.uint8)
    true[4:16, 4:16] = noisy[16:28, 16:28] = 1
    picture = contact_sheet([image], [true], {"box": [true], "moved": [noisy]})
    columns, (top, bottom) = tiles(picture)
    assert len(columns) == 3
    yellow = [np.argwhere((picture[top:bottom, left:right] == (240, 228, 66)).all(axis=2)) for left, right in columns]
    assert len(yellow[0]) == 0
    assert 0 < yellow[1].mean() < (bottom - top) / 2 < yellow[2].mean()


NAMES = ["$\\frac{$", "_private", "a_b^c", "<b>&amp;</b>", "模型", "100 % \\alpha"]


def test_names_are_drawn_as_they_are():
    """As mathematics the first is a parse error, and the last ones would be drawn as something else."""
    from matplotlib import rc_context

    series = {name: [(1.0, 0.5, 0.1), (2.0, 0.6, 0.1)] for name in NAMES}
    words = {name: [(name, 0.5, 0.1)] for name in NAMES}
    images, noisy, true = samples(1)
    with rc_context({"text.usetex": True}):  # a user's matplotlibrc
        line_charts({NAMES[0]: series}, NAMES[0], NAMES[0])
        line_charts({NAMES[0]: words}, NAMES[0], NAMES[0])
        bar_chart(dict.fromkeys(NAMES, 1.0), NAMES[0])
        curves({name: [{"step": 1, "val/dice": 0.5}] for name in NAMES})
        panel(images, noisy, true, torch.rand(1, SIDE, SIDE), true.float(), caption=NAMES[0])
        contact_sheet([np.zeros((SIDE, SIDE, 3), np.uint8)], [true[0].numpy()], {NAMES[0]: [true[0].numpy()]})
        comparison_figure({}, images, noisy, true, {NAMES[0]: true > 0})


def test_a_name_that_begins_with_an_underscore_is_in_the_legend():
    wide = line_charts({"K": {"_private": [(1.0, 0.5, 0.0)]}}, "x", "y")
    legend = wide[:, 425:]  # right of the chart
    assert has_colour(legend, (0x00, 0x72, 0xB2))


def test_a_logarithmic_axis_sets_factors_of_two_apart_evenly():
    places = [1.0, 2.0, 4.0, 8.0]
    chart = line_charts({"": {"m": [(x, 0.5, 0.0) for x in places]}}, "x", "y", log_x=True)[:, :418]
    columns = np.flatnonzero((np.abs(chart.astype(int) - (0x00, 0x72, 0xB2)).sum(axis=2) < 12).sum(axis=0) >= 5)
    markers = np.split(columns, np.flatnonzero(np.diff(columns) > 3) + 1)
    steps = np.diff([group.mean() for group in markers])
    assert len(markers) == 4
    assert steps == pytest.approx([steps.mean()] * 3, abs=1.5)


def test_a_long_name_fits_over_its_column_and_leaves_the_curves_their_room():
    images, noisy, true = samples(1)
    name = "noisy_only-boundary_0.7_0.5-kany-s0-da247bfb" * 2
    picture = comparison_figure({name: RUNS["noisy_only"]}, images, noisy, true, {name: true > 0})
    assert has_colour(picture[:250], (0x00, 0x72, 0xB2))  # the curve
    title = picture[300:].astype(int)
    _, (top, _) = tiles(title)
    (_, _, (left, right)), _ = tiles(title)
    written = np.flatnonzero((np.abs(title[:top] - (0x00, 0x72, 0xB2)).sum(axis=2) < 60).any(axis=0))
    assert left - 12 <= written.min() and written.max() <= right + 12


CLASSES = ("skin", "lesion", "hair")
OF_LESION, OF_HAIR = (0x56, 0xB4, 0xE9), (0xE6, 0x9F, 0x00)


def classes_of(count: int) -> torch.Tensor:
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.uint8)
    masks[:, 4:28, 4:28], masks[:, 12:20, 12:20], masks[:, :2] = 1, 2, 255
    return masks


def test_each_class_has_a_colour_in_every_figure_and_a_legend_below() -> None:
    images, masks = torch.zeros(2, 3, SIDE, SIDE), classes_of(2)
    logits = torch.nn.functional.one_hot(masks.long() % 255, 3).permute(0, 3, 1, 2).float()
    weights = torch.rand(2, SIDE, SIDE)
    array = [image.numpy() for image in masks]
    pictures = [np.zeros((SIDE, SIDE, 3), np.uint8)] * 2
    drawn = {
        "panel": (
            panel(images, masks, masks, weights, logits, "c", CLASSES),
            panel(images, masks, masks, weights, masks.float(), "c"),
        ),
        "sheet": (
            contact_sheet(pictures, array, {"box": array}, CLASSES),
            contact_sheet(pictures, array, {"box": array}),
        ),
        "comparison": (
            comparison_figure(RUNS, images, masks, masks, dict.fromkeys(RUNS, masks), CLASSES),
            comparison_figure(RUNS, images, masks, masks, dict.fromkeys(RUNS, masks == 1)),
        ),
    }
    for name, (several, two) in drawn.items():
        legend, above = np.split(several[::-1], [several.shape[0] - two.shape[0]])
        assert several.shape[0] > two.shape[0] and several.shape[1] == two.shape[1], name
        for colour in (OF_LESION, OF_HAIR):
            assert has_colour(legend, colour) and has_colour(above, colour), (name, colour)
        assert not has_colour(two, OF_HAIR), name


def test_the_prediction_shows_the_most_probable_class() -> None:
    images, masks = torch.zeros(1, 3, SIDE, SIDE), classes_of(1) % 255
    images[:, 2] = 1  # blue, as `tiles` wants them
    probabilities = torch.full((1, 3, SIDE, SIDE), 0.1)
    probabilities[:, 2] = 0.8
    picture = panel(images, masks, masks, torch.ones(1, SIDE, SIDE), probabilities, "", CLASSES)
    columns, (top, bottom) = tiles(picture)
    (left, right), _, (third, _) = columns[:3]
    left, right = (round(end + 5 * (third - left) / 2) for end in (left, right))  # the sixth
    tile = picture[top + 3 : bottom - 3, left + 3 : right - 3].astype(int)
    filled = np.abs(tile - np.array(OF_HAIR) * 0.45 - np.array(BLUE) * 0.55).sum(axis=2) < 12
    assert filled.mean() > 0.7


def test_a_legend_of_many_classes_takes_several_lines() -> None:
    masks = classes_of(1)
    names = ("background", *(f"a rather long class name {number}" for number in range(12)))
    pictures = [np.zeros((SIDE, SIDE, 3), np.uint8)]
    many = contact_sheet(pictures, [masks[0].numpy()], {"box": [masks[0].numpy()]}, names)
    few = contact_sheet(pictures, [masks[0].numpy()], {"box": [masks[0].numpy()]}, CLASSES)
    assert many.shape[1] == few.shape[1] and many.shape[0] >= few.shape[0] + 4 * 20
