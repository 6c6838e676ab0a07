"""Figures: panels of masks, weights and predictions, curves, charts.

The only importer of matplotlib, and only when a figure is drawn. Figures are made with the object interface, so they
share no state with a caller's pyplot and need no display. Text is drawn as it is: `$` and `\\` have no meaning in it.
"""

import functools
import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
from torch import Tensor

from distseg.evaluation.metrics import IGNORE, class_confusion, confusion, image_scores
from distseg.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Arguments = ParamSpec("_Arguments")
_Drawn = TypeVar("_Drawn")

# Okabe and Ito's colours, which colour-blind readers tell apart, with a purple and a grey: first masks, then runs.
_TRUE, _NOISY, _IGNORED = "#56B4E9", "#F0E442", "#808080"
# Of several classes by id, after background; the next one again where there are more.
_CLASSES = ("#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#F0E442", "#D55E00", "#0072B2", "#6A51A3")
_RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#6A51A3", "#7F7F7F", "#8C510A", "#66C2A5", "#000000")
_SPLITS = ("#0072B2", "#E69F00", "#009E73")
"""Train, val and test."""
_LEAST_SHARE = 1e-3
_MARKERS = ("o", "s", "^", "v")
"""The next one where names outnumber colours."""
_MOST_ROWS = 6
_MOST_CHARTS = 100
_DPI = 120
# Inches.
_TILE, _GAP, _NOTE, _MARGIN, _TITLE = 1.5, 0.06, 0.16, 0.12, 0.22
_CURVE_HEIGHT, _CURVE_LEFT, _CURVE_BELOW, _LEAST_CURVE = 2.1, 0.6, 0.45, 2.5
_LONGEST_TITLE = 24
"""Letters that fit over a tile."""
_TEXT: dict[str, Any] = {"fontsize": 8, "color": "#222222"}


def _text_as_it_is(draw: Callable[_Arguments, _Drawn]) -> Callable[_Arguments, _Drawn]:
    """Draw names as they are: no TeX, and no warning for a character that the font lacks."""

    @functools.wraps(draw)
    def drawn(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Drawn:
        from matplotlib import rc_context

        # Figures make some of their texts as late as in rendering: the settings must hold until then.
        with rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
            return draw(*args, **kwargs)

    return drawn


@_text_as_it_is
def panel(
    images: Tensor,
    masks: Tensor,
    true_masks: Tensor | None,
    weights: Tensor,
    probabilities: Tensor,
    caption: str,
    class_names: Sequence[str] = (),
) -> np.ndarray:
    """Show what the method sees and does, one row per sample, at most 6.

    Columns: image; image with the noisy mask's contour; image with the true one's; the wrong labels, white; weight map
    under both contours; foreground probability, black 0 to white 1, under the true contour. Ignored pixels are grey.
    Without `true_masks` the two columns that need them are not there, and the prediction is under the noisy contour.

    `images` (B, 3, H, W) RGB in [0, 1]; `masks` and `true_masks` (B, H, W) class ids, 255 = ignore; `weights` (B, H, W)
    ≥ 0 in any unit; `probabilities` (B, H, W) in [0, 1]; on any device. Few pixels carry most of a weight map, so each
    map is scaled to the 99th percentile of its positive weights, written below it as a multiple of the map's mean.

    With the names of more than two classes, background first, each class has a colour, which a legend says; contours
    on the weight map are those of the noisy mask; and `probabilities` are (B, C, H, W), of which the prediction shows
    the most probable class, filled. Returns (h, w, 3) uint8.
    """
    several = len(class_names) > 2
    pictures = _pictures(images[:_MOST_ROWS])
    noisy, weight, probability = (
        tensor[:_MOST_ROWS].detach().float().cpu().numpy() for tensor in (masks, weights, probabilities)
    )
    true = true_masks[:_MOST_ROWS].cpu().numpy() if true_masks is not None else None
    of_truth = () if true is None else ("true mask", "wrong labels")
    titles = ("image", "noisy mask", *of_truth, "weights", "prediction")
    figure, grid = _sheet(len(pictures), titles, caption, class_names=class_names)
    outline = _outline_classes if several else _contour
    for row, picture in enumerate(pictures):
        image, with_noisy, *about_truth, weight_map, prediction = grid[row]
        for axes in (image, with_noisy, *about_truth[:1]):
            axes.imshow(picture, interpolation="bilinear")
        outline(with_noisy, noisy[row], _NOISY)
        if true is not None:
            with_true, error = about_truth
            outline(with_true, true[row], _TRUE)
            wrong = (noisy[row] != true[row]) & (noisy[row] != IGNORE) & (true[row] != IGNORE)
            error.imshow(wrong, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            _note(error, f"{wrong.mean():.1%}")

        positive = weight[row][weight[row] > 0]
        top = np.percentile(positive, 99) if positive.size else 1.0
        weight_map.imshow(weight[row], cmap="magma", vmin=0, vmax=top, interpolation="nearest")
        outline(weight_map, noisy[row], _NOISY, width=0.7)
        if true is not None and not several:
            _contour(weight_map, true[row], _TRUE, width=0.7)
        _note(weight_map, f"0 – {top / weight[row].mean():.1f} × mean" if positive.size else "all 0")

        below = noisy[row] if true is None else true[row]
        if several:
            prediction.imshow(picture, interpolation="bilinear")
            _fill_classes(prediction, probability[row].argmax(axis=0))
            _outline_classes(prediction, below, width=0.7)
        else:
            prediction.imshow(probability[row], cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
            _contour(prediction, below, _NOISY if true is None else _TRUE)
    return _pixels(figure)


@_text_as_it_is
def contact_sheet(
    images: Sequence[np.ndarray],
    true_masks: Sequence[np.ndarray],
    noisy_masks: Mapping[str, Sequence[np.ndarray]],
    class_names: Sequence[str] = (),
) -> np.ndarray:
    """Show what kinds of noise do to the same masks: a row per image, a column per noise level, at most 6 rows.

    Columns: the image with the true contour; then, per level, both contours, and below them the wrong pixels as a share
    of the frame. Images (H, W, 3) uint8 RGB and masks (H, W) class ids, 255 = ignore; sizes may differ from image to
    image. With the names of more than two classes each has a colour, and a level's column its contours alone. Returns
    (h, w, 3) uint8.
    """
    images = images[:_MOST_ROWS]
    figure, grid = _sheet(len(images), ("image, true mask", *noisy_masks), class_names=class_names)
    several = len(class_names) > 2
    for row, (image, true) in enumerate(zip(images, true_masks, strict=False)):
        for axes in grid[row]:
            axes.imshow(image, interpolation="bilinear", aspect="auto")
            if not several:
                _contour(axes, true, _TRUE)
        if several:
            _outline_classes(grid[row][0], true)
        for axes, masks in zip(grid[row][1:], noisy_masks.values(), strict=True):
            (_outline_classes if several else _contour)(axes, masks[row], _NOISY)
            _note(axes, f"{np.mean(masks[row] != true):.1%} wrong")
    return _pixels(figure)


@_text_as_it_is
def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> np.ndarray:
    """Draw validation Dice against step, one line per run, from the records of each run's metrics.jsonl.

    Returns (h, w, 3) uint8.
    """
    figure = _figure(_CURVE_LEFT + 4.2 + _legend_width(runs), _MARGIN + _CURVE_HEIGHT + _CURVE_BELOW)
    _draw_curves(figure, runs, _colours(runs))
    return _pixels(figure)


@_text_as_it_is
def comparison_figure(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    images: Tensor,
    masks: Tensor,
    true_masks: Tensor,
    predictions: Mapping[str, Tensor],
    class_names: Sequence[str] = (),
) -> np.ndarray:
    """Set methods side by side: the curves of `runs` above, and below them test images with each method's prediction.

    Rows are the samples, at most 6; columns the image, the kind of mask that was trained on, and one per method with
    the prediction filled, the true contour on top and the image's Dice below. A method has one colour throughout, so
    give `runs` and `predictions` the same keys.

    `images` (B, 3, H, W) RGB in [0, 1]; `masks` and `true_masks` (B, H, W) class ids, 255 = ignore; each prediction
    (B, H, W) bool; on any device. With the names of more than two classes, background first, predictions are class ids,
    colours are of classes, which a legend says, and the Dice below is the macro mean. Returns (h, w, 3) uint8.
    """
    pictures = _pictures(images[:_MOST_ROWS])
    true, several = true_masks[:_MOST_ROWS].cpu(), len(class_names) > 2
    outline = _outline_classes if several else _contour
    colour = _colours([*runs, *predictions])
    titles = ("image, true mask", "training mask", *predictions)
    least = _CURVE_LEFT + _LEAST_CURVE + _legend_width(runs)
    above = _CURVE_HEIGHT + _CURVE_BELOW
    figure, grid = _sheet(len(pictures), titles, above=above, least_width=least, class_names=class_names)
    for axes, name in zip(grid[0][2:], predictions, strict=True):
        axes.title.set_color(colour[name])
    _draw_curves(figure, runs, colour)

    def counted(prediction: Tensor) -> np.ndarray:
        return (class_confusion(prediction, true, len(class_names)) if several else confusion(prediction, true)).numpy()

    scores = {
        name: image_scores(counted(prediction[:_MOST_ROWS].cpu()))["dice"] for name, prediction in predictions.items()
    }
    for row, picture in enumerate(pictures):
        for axes in grid[row]:
            axes.imshow(picture, interpolation="bilinear")
        outline(grid[row][0], true[row].numpy(), _TRUE)
        outline(grid[row][1], masks[row].cpu().numpy(), _NOISY)
        for axes, (name, prediction) in zip(grid[row][2:], predictions.items(), strict=True):
            if several:
                _fill_classes(axes, prediction[row].cpu().numpy())
            else:
                _fill(axes, prediction[row].cpu().numpy(), colour[name])
            outline(axes, true[row].numpy(), _TRUE)
            _note(axes, f"Dice {scores[name][row]:.3f}")
    return _pixels(figure)


@_text_as_it_is
def line_charts(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float | str, float, float]]]],
    x_label: str,
    y_label: str,
    log_x: bool = False,
) -> np.ndarray:
    """Small charts side by side, one a title: series of (x, mean, deviation) by name, the legend to the right.

    A name has one colour and marker throughout; deviations are drawn as bars where they are above 0. Where x are words
    they stand in the order in which they come. At most 100 charts are drawn. Returns (h, w, 3) uint8.
    """
    panels = dict(list(panels.items())[:_MOST_CHARTS])
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    looks = {name: _look(place, colour) for place, (name, colour) in enumerate(_colours(names).items())}
    width, height, left = 2.9, 2.3, 0.6
    whole = left + len(panels) * (width + 0.25) + _legend_width(names)
    figure = _figure(whole, _MARGIN + _TITLE + height + 0.5)
    drawn: dict[str, Any] = {}
    for column, (title, series) in enumerate(panels.items()):
        axes = _axes(figure, left + column * (width + 0.25), _MARGIN + _TITLE, width, height)
        drawn |= _draw_series(axes, series, looks, log_x)
        axes.set_title(title, pad=4, **_TEXT)
        axes.set_xlabel(x_label, **_TEXT)
        _style(axes)
        if column == 0:
            axes.set_ylabel(y_label, **_TEXT)
        else:
            axes.sharey(figure.axes[0])
            axes.tick_params(labelleft=False)
    if drawn:
        figure.axes[-1].legend(
            drawn.values(), drawn, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=7.5
        )
    return _pixels(figure)


def _look(place: int, colour: str) -> dict[str, Any]:
    return {"color": colour, "marker": _MARKERS[place // len(_RUNS) % len(_MARKERS)]}


def _draw_series(
    axes: "Axes",
    panel: Mapping[str, Sequence[tuple[float | str, float, float]]],
    looks: Mapping[str, Mapping[str, Any]],
    log_x: bool,
) -> dict[str, Any]:
    """Draw the series of one chart of `line_charts`; returns what the legend shows, by name."""
    words = list(dict.fromkeys(x for points in panel.values() for x, *_ in points if isinstance(x, str)))
    drawn = {}
    for number, (name, points) in enumerate(panel.items()):
        if not points:
            continue
        beside = 0.5 * (number / max(1, len(panel) - 1) - 0.5)  # that the bars of words can be told apart
        xs = [words.index(x) + beside if isinstance(x, str) else x for x, *_ in points]
        means, deviations = [mean for _, mean, _ in points], [deviation for *_, deviation in points]
        drawn[name] = axes.errorbar(
            xs, means, deviations, markersize=4, linewidth=0 if words else 1.3, elinewidth=1, capsize=2, **looks[name]
        )
    if log_x and not words:
        axes.set_xscale("log")
    numbers = sorted({x for points in panel.values() for x, *_ in points if not isinstance(x, str)})
    if words:
        axes.set_xticks(range(len(words)), words)
        axes.set_xlim(-0.5, len(words) - 0.5)
    elif len(numbers) <= 5:
        axes.set_xticks(numbers, [f"{x:.3g}" for x in numbers])
        axes.minorticks_off()
    return drawn


@_text_as_it_is
def bar_chart(values: Mapping[str, float], label: str) -> np.ndarray:
    """Horizontal bars with their values written beside them. Returns (h, w, 3) uint8."""
    height = 0.26 * max(1, len(values))
    figure = _figure(7.0, _MARGIN + height + 0.55)
    axes = _axes(figure, _legend_width(values), _MARGIN, 7.0 - _legend_width(values) - 0.6, height)
    bars = axes.barh(list(values), list(values.values()), color=list(_colours(values).values()), height=0.7)
    axes.bar_label(bars, fmt="%.3g", padding=3, **_TEXT)
    axes.invert_yaxis()
    axes.set_xlabel(label, **_TEXT)
    _style(axes)
    return _pixels(figure)


@_text_as_it_is
def share_histogram(shares: Mapping[str, Sequence[float]], label: str) -> np.ndarray:
    """How many masks of each name mark which share of their frame, on a logarithmic axis, empty ones at its left end.

    A name's bars sum to 1, so that small splits can be set beside large ones. Returns (h, w, 3) uint8.
    """
    figure = _figure(4.6, 2.9)
    axes = _axes(figure, 0.6, _MARGIN, 3.85, 2.25)
    edges = np.geomspace(_LEAST_SHARE, 1, 25).tolist()
    for (name, values), colour in zip(shares.items(), _SPLITS, strict=False):
        if values:
            clipped, weights = np.clip(values, _LEAST_SHARE, 1), np.full(len(values), 1 / len(values))
            axes.hist(clipped, edges, weights=weights, histtype="stepfilled", color=f"{colour}30")
            axes.hist(clipped, edges, weights=weights, histtype="step", color=colour, linewidth=1.5, label=name)
    axes.set_xscale("log")
    ticks = [share for share in (0.001, 0.01, 0.1, 1) if share >= _LEAST_SHARE]
    axes.set_xticks(ticks, [f"{share:.3g}".rstrip("0") if share < 1 else "1" for share in ticks])
    axes.set_xlabel(label, **_TEXT)
    axes.set_ylabel("share of the masks", **_TEXT)
    _style(axes)
    if any(shares.values()):
        axes.legend(frameon=False, fontsize=7.5, loc="upper left")
    return _pixels(figure)


@_text_as_it_is
def heat_maps(maps: Mapping[str, np.ndarray]) -> np.ndarray:
    """Square maps (S, S) ≥ 0 side by side under their names, dark 0 to the brightest of all.

    Returns (h, w, 3) uint8.
    """
    figure, [tiles] = _sheet(1, tuple(maps))
    top = max(float(values.max()) for values in maps.values()) or 1.0
    for axes, values in zip(tiles, maps.values(), strict=True):
        axes.imshow(values, cmap="magma", vmin=0, vmax=top, interpolation="bicubic")
        _note(axes, f"at most {values.max():.0%}")
    return _pixels(figure)


@_text_as_it_is
def size_chart(sizes: Mapping[str, Sequence[tuple[int, int]]]) -> np.ndarray:
    """Width against height of images, a dot for each size whose area grows with their number, by name.

    Returns (h, w, 3) uint8.
    """
    figure = _figure(3.7, 2.9)
    axes = _axes(figure, 0.65, _MARGIN, 2.9, 2.25)
    highest = 1
    for (name, values), colour in zip(sizes.items(), _SPLITS, strict=False):
        if values:
            distinct, counts = np.unique(np.array(values), axis=0, return_counts=True)
            areas = 14 + 180 * counts / counts.sum()
            axes.scatter(distinct[:, 0], distinct[:, 1], areas, color=colour, alpha=0.5, linewidths=0, label=name)
            highest = max(highest, int(distinct.max()))
    axes.axline((0, 0), slope=1, color="#BBBBBB", linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 1.1 * highest), ylim=(0, 1.1 * highest))
    axes.set_xlabel("width, pixels", **_TEXT)
    axes.set_ylabel("height, pixels", **_TEXT)
    _style(axes)
    return _pixels(figure)


def save_png(array: np.ndarray, path: Path) -> None:
    """Write an (h, w, 3) uint8 image as PNG; a kill leaves the old file or the new one."""
    write_atomically(path, png(array))


def png(array: np.ndarray) -> bytes:
    """The PNG of an (h, w, 3) uint8 image."""
    from matplotlib.image import imsave

    out = io.BytesIO()
    imsave(out, array, format="png")
    return out.getvalue()


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, facecolor="white")


def _axes(figure: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    """Axes at a place in inches, measured from the figure's top left corner."""
    whole_width, whole_height = figure.get_size_inches()
    return figure.add_axes(
        (left / whole_width, 1 - (top + height) / whole_height, width / whole_width, height / whole_height)
    )


def _sheet(
    rows: int,
    titles: Sequence[str],
    caption: str = "",
    above: float = 0.0,
    least_width: float = 0.0,
    class_names: Sequence[str] = (),
) -> tuple["Figure", list[list["Axes"]]]:
    """A figure of rows × len(titles) square tiles, titles over the first row; `above` them inches left free.

    Below them is a legend of the classes, where there are more than two.
    """
    top = _MARGIN + above + (_TITLE if caption else 0) + _TITLE
    across, down = _TILE + _GAP, _TILE + _NOTE + _GAP
    width, height = 2 * _MARGIN + len(titles) * across - _GAP, top + rows * down - _GAP + _MARGIN
    width = max(width, least_width)
    lines = _legend_lines(class_names, width - 2 * _MARGIN) if len(class_names) > 2 else []
    height += _TITLE * len(lines)
    figure = _figure(width, height)
    for number, line in enumerate(lines):
        _draw_legend(figure, line, height - _MARGIN - _TITLE * (len(lines) - number - 0.5))
    figure.text(_MARGIN / width, 1 - (_MARGIN + above) / height, caption, va="top", **_TEXT)
    grid = [
        [_axes(figure, _MARGIN + column * across, top + row * down, _TILE, _TILE) for column in range(len(titles))]
        for row in range(rows)
    ]
    for axes in (axes for line in grid for axes in line):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color="#BBBBBB", linewidth=0.5)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(_shortened(title), pad=4, **_TEXT)
    return figure, grid


def _legend_lines(class_names: Sequence[str], width: float) -> list[list[tuple[str, str]]]:
    """The classes but background with their colours, as many a line as fit into `width` inches."""
    lines: list[list[tuple[str, str]]] = [[]]
    taken = 0.0
    for label, name in enumerate(class_names[1:], start=1):
        wide = _entry_width(name)
        if lines[-1] and taken + wide > width:
            lines.append([])
            taken = 0.0
        lines[-1].append((name, _class_colour(label)))
        taken += wide
    return lines


def _draw_legend(figure: "Figure", entries: Sequence[tuple[str, str]], middle: float) -> None:
    """Squares and names from the left, `middle` inches below the figure's top."""
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches()
    left = _MARGIN
    for name, colour in entries:
        square = (left / width, 1 - (middle + 0.05) / height)
        figure.add_artist(Rectangle(square, 0.1 / width, 0.1 / height, color=colour, transform=figure.transFigure))
        figure.text((left + 0.16) / width, 1 - middle / height, name, va="center", **_TEXT)
        left += _entry_width(name)


def _entry_width(name: str) -> float:
    return 0.4 + 0.07 * len(name)


def _class_colour(label: int) -> str:
    return _CLASSES[(label - 1) % len(_CLASSES)]


def _shortened(title: str) -> str:
    """A title that fits over a tile: both ends of a longer one, as run names end in what tells them apart."""
    half = _LONGEST_TITLE // 2
    return title if len(title) <= _LONGEST_TITLE else f"{title[: half - 1]}…{title[-half:]}"


def _outline_classes(axes: "Axes", mask: np.ndarray, _colour: str = "", width: float = 1.3) -> None:
    """Outline each class but background of class ids (H, W) in its colour, and grey out what is ignored."""
    _fill(axes, mask == IGNORE, _IGNORED)
    for label in _labels_in(mask):
        _line(axes, mask == label, _class_colour(label), width)


def _fill_classes(axes: "Axes", ids: np.ndarray) -> None:
    for label in _labels_in(ids):
        _fill(axes, ids == label, _class_colour(label))


def _labels_in(ids: np.ndarray) -> list[int]:
    return [int(label) for label in np.unique(ids) if label not in (0, IGNORE)]


def _contour(axes: "Axes", mask: np.ndarray, colour: str, width: float = 1.3) -> None:
    """Outline the foreground of class ids (H, W), and grey out what is ignored."""
    ignored = mask == IGNORE
    _fill(axes, ignored, _IGNORED)
    _line(axes, (mask > 0) & ~ignored, colour, width)


def _line(axes: "Axes", foreground: np.ndarray, colour: str, width: float) -> None:
    from matplotlib.patheffects import withStroke

    if foreground.any() and not foreground.all():
        lines = axes.contour(foreground, levels=(0.5,), colors=[colour], linewidths=width)
        # A dark rim keeps the line visible on skin and on lesion alike.
        lines.set_path_effects([withStroke(linewidth=width + 1, foreground="#00000090")])


def _fill(axes: "Axes", region: np.ndarray, colour: str) -> None:
    from matplotlib.colors import to_rgba

    axes.imshow(region[..., None] * np.array(to_rgba(colour, 0.45)), interpolation="nearest")


def _note(axes: "Axes", text: str) -> None:
    """A small line under a tile."""
    axes.text(0.5, -0.02, text, transform=axes.transAxes, ha="center", va="top", fontsize=6.5, color="#555555")


def _colours(names: Iterable[str]) -> dict[str, str]:
    return {name: _RUNS[place % len(_RUNS)] for place, name in enumerate(dict.fromkeys(names))}


def _legend_width(runs: Iterable[str]) -> float:
    """Inches that the longest `name  0.123` takes: a mean letter at 7.5 points is 0.065 inches wide."""
    return 0.5 + 0.065 * (7 + max((len(name) for name in runs), default=0))


def _draw_curves(figure: "Figure", runs: Mapping[str, Sequence[Mapping[str, Any]]], colour: Mapping[str, str]) -> None:
    """Fill the top of the figure, legend to the right in the order of the last values."""
    width = figure.get_size_inches()[0] - _CURVE_LEFT - _legend_width(runs)
    axes = _axes(figure, _CURVE_LEFT, _MARGIN, width, _CURVE_HEIGHT)
    points = {
        name: [(record["step"], record["val/dice"]) for record in records if record.get("val/dice") is not None]
        for name, records in runs.items()
    }
    drawn = sorted((name for name in points if points[name]), key=lambda name: -points[name][-1][1])
    for name in drawn:
        steps, dice = zip(*points[name], strict=True)
        axes.plot(steps, dice, color=colour[name], linewidth=1.6, marker="o", markersize=2.5, label=name)
    axes.set_xlabel("step", **_TEXT)
    axes.set_ylabel("validation Dice", **_TEXT)
    _style(axes)
    if drawn:
        labels = [f"{name}  {points[name][-1][1]:.3f}" for name in drawn]
        axes.legend(labels, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=7.5, handlelength=1.4)


def _style(axes: "Axes") -> None:
    axes.tick_params(labelsize=7, colors="#444444", length=2.5)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")


def _pictures(images: Tensor) -> np.ndarray:
    return images.detach().float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def _pixels(figure: "Figure") -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
