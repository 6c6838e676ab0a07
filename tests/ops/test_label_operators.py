"""Signed-distance bins and correction: against closed forms written out here, between backends, and what raises."""

import math
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from distseg import ops
from distseg.labels.distances import INSIDE, INSIDE_EDGES, OUTSIDE, OUTSIDE_EDGES, signed_distance_bins
from distseg.ops import reference
from distseg.testing.operator_cases import MASK_CASES, MaskCase, check_bins

BACKENDS = ["csrc", "triton", "reference"]
FAST = ["csrc", "triton"]


# ---- signed distance


@pytest.mark.parametrize("case", MASK_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", FAST)
def test_every_backend_has_the_same_bins(backend: str, case: MaskCase) -> None:
    with ops.using(backend):
        check_bins(case)


@pytest.mark.parametrize("case", [case for case in MASK_CASES if math.prod(case.shape)], ids=lambda case: case.name)
def test_squared_distances_are_exact(case: MaskCase) -> None:
    masks = case.draw()
    sides = torch.where((masks > 0) & (masks < case.classes), masks, 0).long()
    squared = reference.squared_distances(sides)
    for side, found in zip(sides.numpy(), squared.numpy(), strict=True):
        for number in np.unique(side):
            own = side == number
            if own.all():
                assert (found >= reference.FAR**2).all()
            else:
                expected = np.rint(distance_transform_edt(own) ** 2).astype(np.int64)
                assert (found[own] == expected[own]).all()


def exceeds(squared: int, edge: int, area: int) -> bool:
    """√squared − 1/2 > edge/20·√area, in integers: 20·√squared > 10 + edge·√area, squared twice."""
    rest = 400 * squared - 100 - edge * edge * area
    return rest > 0 and rest * rest > 400 * edge * edge * area


def below(squared: int, edge: int, area: int) -> bool:
    rest = 400 * squared - 100 - edge * edge * area
    return rest < 0 or rest * rest < 400 * edge * edge * area


def expected_bins(mask: NDArray[np.integer], classes: int, given: int = 0) -> NDArray[np.integer]:
    objects = (mask > 0) & (mask < classes)
    bins = np.full(mask.shape, OUTSIDE + INSIDE * (classes - 1))
    if objects.any():
        for place in np.ndindex(*mask.shape):
            own = mask == mask[place] if objects[place] else ~objects
            others = np.argwhere(~own)
            squared = ((others - place) ** 2).sum(1).min().item() if len(others) else 10**12
            if objects[place]:
                area = given or own.sum().item()
                base = OUTSIDE + INSIDE * (int(mask[place]) - 1)
                bins[place] = base + sum(exceeds(squared, edge, area) for edge in INSIDE_EDGES)
            else:
                bins[place] = sum(below(squared, edge, given or objects.sum().item()) for edge in OUTSIDE_EDGES)
    return np.where(mask == ops.IGNORE, ops.IGNORE, bins)


@pytest.mark.parametrize("case", [case for case in MASK_CASES if math.prod(case.shape) < 3000], ids=lambda c: c.name)
def test_bins_by_their_definition(case: MaskCase) -> None:
    masks = case.draw()
    for area in (0, 144):
        actual = reference.signed_distance_bins(masks, case.classes, OUTSIDE_EDGES, INSIDE_EDGES, area)
        for mask, found in zip(masks.numpy(), actual.numpy(), strict=True):
            np.testing.assert_array_equal(found, expected_bins(mask, case.classes, area))


@pytest.mark.parametrize("backend", ["csrc", "reference", pytest.param("triton", marks=pytest.mark.slow)])
def test_bins_are_those_of_distances_in_floating_point(backend: str) -> None:
    """OpenCV's exact distances, in single precision: no pixel of these masks lies that near to an edge."""
    rows, columns = np.mgrid[:96, :96]
    masks = [
        np.hypot(rows - y, columns - x) < radius
        for y, x, radius in ((40, 50, 20), (8, 90, 13.3), (60, 30, 4), (48, 48, 60))
    ]
    edges = np.array(
        [*(-edge / 20 for edge in OUTSIDE_EDGES[::-1]), 0.0, *(edge / 20 for edge in INSIDE_EDGES)], np.float32
    )
    expected = []
    for mask in masks:
        size = np.float32(np.sqrt(mask.sum()))
        outwards, inwards = (
            (cv2.distanceTransform(side.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) - np.float32(0.5)) / size
            for side in (~mask, mask)
        )
        expected.append(np.searchsorted(edges, np.where(mask, inwards, -outwards)))
    with ops.using(backend):
        actual = signed_distance_bins(torch.as_tensor(np.stack(masks).astype(np.uint8)))
    np.testing.assert_array_equal(actual, np.stack(expected))
    assert len(np.unique(actual)) == OUTSIDE + INSIDE


@pytest.mark.parametrize("area", [1, 2, 99, 100, 101, 10**4, 12345, 67108864])
@pytest.mark.parametrize("edge", [1, 8, 30])
def test_edges_are_exact_where_they_meet_a_distance(edge: int, area: int) -> None:
    """Edge · 10 pixels of a size of 200 lie at a distance that is an integer and a half."""
    areas = torch.tensor([area])
    at, under = (reference.squared_edges(areas, edge, below=each).item() for each in (False, True))
    assert not exceeds(at, edge, area) and exceeds(at + 1, edge, area)
    assert below(under, edge, area) and not below(under + 1, edge, area)
    meets = (edge * math.isqrt(area)) % 20 == 10 and math.isqrt(area) ** 2 == area
    assert (at != under) == meets


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_and_edges_that_do_not_fit_are_an_error(backend: str) -> None:
    masks = torch.zeros(1, 4, 4, dtype=torch.uint8)
    with ops.using(backend):
        for given, classes, edges, message in (
            (masks[0], 2, (1, 2), r"masks \(4, 4\): need \(N, H, W\)"),
            (masks.new_zeros(1, 16385).expand(1, 1, 16385), 2, (1, 2), "at most 16384 pixels a side"),
            (masks.float(), 2, (1, 2), "need integer class ids"),
            (masks, 1, (1, 2), "need 2 classes at least"),
            (masks, 42, (1, 2, 3, 4, 5, 6), "42 classes have 295 bins: .*at most 255 bins"),
            (masks, 2, (2, 1), "need ascending twentieths"),
            (masks, 2, (1, 31), "1 to 30"),
            (masks, 2, (), "need ascending twentieths"),
        ):
            with pytest.raises(ValueError, match=message):
                ops.signed_distance_bins(given, classes, edges, edges)
        for area in (-1, 16384**2 + 1):
            with pytest.raises(ValueError, match=rf"area {area}: need 0 to 268435456 pixels"):
                ops.signed_distance_bins(masks, 2, (1, 2), (1, 2), area)


def test_bins_do_not_depend_on_the_number_of_threads() -> None:
    case = MaskCase("many", (3, 211, 307), classes=3, size=60.0)
    masks, threads = case.draw(), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(signed_distance_bins(masks, 3))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, found[0]) for each in found)
    assert torch.equal(found[0], reference.signed_distance_bins(masks, 3, OUTSIDE_EDGES, INSIDE_EDGES))


# ---- correction


def some(channels: int, annotations: int = 2) -> dict[str, Tensor]:
    """Float64 inputs of two images; the second one has one annotation less."""
    generator = torch.Generator().manual_seed(channels)
    classes = max(2, channels)
    masks = torch.randint(0, classes, (2, 5, 7), generator=generator).to(torch.uint8)
    masks[0, 0, :3] = ops.IGNORE
    bins = torch.randint(0, 9, (2, annotations, 5, 7), generator=generator).to(torch.uint8)
    bins[0, 0, 1, 2:] = ops.IGNORE
    annotators = torch.arange(annotations).remainder(2).repeat(2, 1)
    if annotations > 1:
        annotators[1, -1] = -1
    return {
        "logits": 2 * torch.randn(2, channels, 5, 7, generator=generator, dtype=torch.float64),
        "masks": masks,
        "bins": bins,
        "annotators": annotators,
        "tables": torch.randn(2, classes, 9, generator=generator, dtype=torch.float64),
        "calibration": torch.cat([torch.tensor([0.7]), torch.randn(classes - 1, generator=generator)]).double(),
    }


def pixels(inputs: dict[str, Tensor]) -> Iterator[tuple[tuple[int, int, int], list[float]]]:
    """Each valid pixel and the posterior probabilities of its classes, with Python's numbers."""
    scale, *shifts = inputs["calibration"].tolist()
    tables = inputs["tables"].tolist()
    for b, h, w in np.ndindex(*inputs["masks"].shape):
        if inputs["masks"][b, h, w] == ops.IGNORE:
            continue
        z = inputs["logits"][b, :, h, w].tolist()
        z = [0.0, *z] if len(z) == 1 else z
        u = [scale * (value - z[0]) + shift for value, shift in zip(z, [0.0, *shifts], strict=True)]
        for who, place in zip(inputs["annotators"][b].tolist(), inputs["bins"][b, :, h, w].tolist(), strict=True):
            if who >= 0 and place != ops.IGNORE:
                u = [value + tables[who][c][place] for c, value in enumerate(u)]
        total = sum(math.exp(value) for value in u)
        yield (b, h, w), [math.exp(value) / total for value in u]


@pytest.mark.parametrize("annotations", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_and_counts_by_their_closed_form(backend: str, channels: int, annotations: int) -> None:
    inputs = some(channels, annotations)
    labels, counts = inputs["masks"].clone(), np.zeros(inputs["tables"].shape)
    for (b, h, w), p in pixels(inputs):
        labels[b, h, w] = int(np.argmax(p))
        for who, place in zip(inputs["annotators"][b].tolist(), inputs["bins"][b, :, h, w].tolist(), strict=True):
            if who >= 0 and place != ops.IGNORE:
                counts[who, :, place] += p
    with ops.using(backend):
        actual, found = ops.correct_labels(**inputs)
    assert torch.equal(actual, labels) and (actual != inputs["masks"]).any()
    np.testing.assert_allclose(found, counts, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_classes_as_one_and_as_two_logits_have_the_same_bits(backend: str) -> None:
    inputs = some(2)
    with ops.using(backend):
        two = ops.correct_labels(**inputs)
        difference = inputs["logits"][:, 1:] - inputs["logits"][:, :1]
        one = ops.correct_labels(**inputs | {"logits": difference})
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_batch_add_up(backend: str) -> None:
    """What ranks and accumulation rest on."""
    inputs = some(3)
    with ops.using(backend):
        labels, counts = ops.correct_labels(**inputs)
        of_batch = "logits", "masks", "bins", "annotators"
        parts = [ops.correct_labels(**inputs | {name: inputs[name][i : i + 1] for name in of_batch}) for i in range(2)]
    assert torch.equal(labels, torch.cat([part[0] for part in parts]))
    torch.testing.assert_close(counts, parts[0][1] + parts[1][1], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_is_not_corrected_and_shows_in_the_counts(backend: str, channels: int) -> None:
    inputs = some(channels)
    with ops.using(backend):
        right, _ = ops.correct_labels(**inputs)
        for value in (math.nan, math.inf):
            logits = inputs["logits"].clone()
            logits[:, :, 0, 0] = value  # ignored in the first image
            labels, counts = ops.correct_labels(**inputs | {"logits": logits})
            right[1, 0, 0] = inputs["masks"][1, 0, 0]
            assert torch.equal(labels, right)
            assert not counts[0].isfinite().all() and counts[1].isfinite().all()


@pytest.mark.parametrize("label", [7, 254, -1, 2**32, 2**32 + 255])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_label_that_is_no_class_is_an_error_on_the_cpu_and_stays_where_nobody_looks(
    channels: int, label: int
) -> None:
    inputs = some(channels)
    inputs["masks"] = inputs["masks"].long()
    inputs["masks"][1, 1, 1] = label
    for backend in BACKENDS:
        with ops.using(backend), pytest.raises(ValueError, match="neither a class id below"):
            ops.correct_labels(**inputs)
    from distseg import kernels

    for raw in (kernels.correct_labels, reference.correct_labels):
        labels, counts = raw(*_in_order(inputs).values())
        assert labels[1, 1, 1] == label and not counts[1, 0].isfinite().all() and counts[0].isfinite().all()


def _in_order(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("logits", "masks", "bins", "annotators", "tables", "calibration")
    return dict(zip(names, (inputs[name] for name in names), strict=True))


def test_counts_do_not_depend_on_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 3, (3, 97, 101), generator=generator, dtype=torch.uint8)
    bins = signed_distance_bins(masks, 3)[:, None]
    given = torch.randn(3, 3, 97, 101, generator=generator), masks, bins, torch.zeros(3, 1, dtype=torch.int64)
    tables, threads = torch.randn(1, 3, OUTSIDE + 2 * INSIDE + 1, generator=generator), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.correct_labels(*given, tables, torch.ones(3)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for result in results for pair in zip(result, results[0], strict=True))
    assert results[0][1].sum().item() == pytest.approx(masks.numel(), rel=1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_differentiating_and_mapping_raise(backend: str) -> None:
    inputs = some(1)
    z = inputs["logits"].clone().requires_grad_()
    with ops.using(backend):
        labels, counts = ops.correct_labels(**inputs | {"logits": z})
        assert not labels.requires_grad
        with pytest.raises(RuntimeError, match="correct_labels is a constant to autograd"):
            counts.sum().backward()
        with pytest.raises(RuntimeError, match="correct_labels is a constant to autograd"):
            torch.func.jvp(lambda x: ops.correct_labels(**inputs | {"logits": x})[1], (z.detach(),), (z.detach(),))
        with pytest.raises(RuntimeError, match="correct_labels has no vmap"):
            torch.func.vmap(lambda x: ops.correct_labels(**inputs | {"logits": x})[1])(torch.stack([z, z]).detach())


def test_bins_map_over_a_dimension_of_masks() -> None:
    cases = [case for case in MASK_CASES if math.prod(case.shape) > 100]
    drawn = min(cases, key=lambda case: math.prod(case.shape)).draw()
    masks = torch.stack([drawn, drawn.flip(2)])
    assert drawn.unique().numel() > 1
    for backend in FAST:
        with ops.using(backend):
            mapped = torch.func.vmap(signed_distance_bins)(masks)
            assert torch.equal(mapped, torch.stack([signed_distance_bins(each) for each in masks]))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bins", lambda x: x[..., :4], "bins .*need"),
        ("bins", lambda x: x.long(), "uint8"),
        ("bins", lambda x: x[:, 0], "bins .*need"),
        ("annotators", lambda x: x[:, :1], "annotators .*need"),
        ("annotators", lambda x: x.float(), "annotators .*need"),
        ("annotators", lambda x: x + 1, "neither −1 nor below 2"),
        ("annotators", lambda x: x - 1, "neither −1 nor below 2"),
        ("tables", lambda x: x[:, :1], "tables .*need"),
        ("tables", lambda x: x[:0], "need R, A and M of at least 1"),
        ("calibration", lambda x: x[:1], r"calibration \(1,\): need"),
        ("masks", lambda x: x[..., :4], "need"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_is_an_error(backend: str, name: str, change, message: str) -> None:
    inputs = some(1)
    with ops.using(backend), pytest.raises(ValueError, match=message):
        ops.correct_labels(**inputs | {name: change(inputs[name])})


@pytest.mark.parametrize("channels", [1, 3])
def test_dispatcher_operators_keep_to_their_schemas(channels: int) -> None:
    with ops.using("csrc"):
        operators = ops.raw_operators(torch.device("cpu"))
    inputs = _in_order(some(channels))
    torch.library.opcheck(operators.correct_labels.default, tuple(inputs.values()))
    masks = inputs["masks"], max(2, channels), [1, 4], [2]
    for area in ((), (144,)):
        torch.library.opcheck(operators.signed_distance_bins.default, (*masks, *area))
