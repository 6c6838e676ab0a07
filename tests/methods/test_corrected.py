"""When labels are corrected and when they are left alone, and that C classes follow their formula."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from distseg import ops
from distseg.errors import UserError
from distseg.labels.annotators import SMOOTHING
from distseg.labels.distances import signed_distance_bins
from distseg.methods.labels.corrected import LEAST_STEPS, Corrected, CorrectedConfig
from distseg.methods.part import HeldOut

NO, YES = torch.tensor(False), torch.tensor(True)
SIDE = 24
SECOND = torch.arange(8) % 2 == 1
FOLD = torch.arange(8) % 2
NOBODY = torch.full((8, SIDE, SIDE), 255, dtype=torch.uint8)


def truth_and_logits(seed: int, shift: float, classes: int = 2, images: int = 8) -> tuple[Tensor, Tensor]:
    """Discs of each class, and logits of a network whose scale is 0.75 and whose shift is 0.75·shift."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    truth = torch.zeros(images, SIDE, SIDE, dtype=torch.uint8)
    for index in range(1, classes):
        centre = torch.rand(images, 2, 1, 1, generator=generator) * 12 + 6
        distance = ((rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2).sqrt()
        truth[distance < 5] = index
    right = 3 * torch.nn.functional.one_hot(truth.long(), classes).movedim(-1, 1).double()
    right += 2 * torch.randn(right.shape, generator=generator, dtype=torch.float64)
    right[:, 1:] -= 2.5 + shift  # the classes are rare: about e^−1.9 of the pixels, at a scale of 0.75
    return truth, right


def model_of(classes: int = 2, least_gain: float = 0.05) -> Corrected:
    return Corrected(torch.device("cpu"), classes, 8, least_gain, LEAST_STEPS)


def learn(
    model: Corrected, steps: range, shift: float, held_out: bool = True, skipped: Tensor = NO, young: float = 0.0
) -> dict[str, Tensor]:
    """Logits are those of a network that knows the drawn masks, but for a shift of `young`, and errs by `shift`."""
    found = {}
    for seed in steps:
        masks, logits = truth_and_logits(seed, young, model.classes)
        clean, clean_logits = truth_and_logits(seed + 100, shift, model.classes)
        beside = HeldOut(clean_logits, clean, FOLD, NOBODY) if held_out else None
        found = model.learn(model.correct(logits, masks, model.bins(masks), beside)[1], skipped, 0.1)
    return found


def relabelled(model: Corrected, shift: float) -> tuple[Tensor, Tensor]:
    masks, logits = truth_and_logits(1000, shift, model.classes)
    return model.correct(logits, masks, model.bins(masks), None)[0], masks


@pytest.mark.parametrize("classes", [2, 3])
def test_labels_are_corrected_where_the_clean_images_show_a_shift_and_only_there(classes: int) -> None:
    for shift, corrects in ((4.0, 1), (0.0, 0)):
        model = model_of(classes)
        found = learn(model, range(LEAST_STEPS + 5), shift)
        assert found["labels/corrects"] == corrects
        assert (found["labels/gain"] - found["labels/gain_error"] > 0.05) == bool(corrects)
        assert found["labels/shift"].item() == pytest.approx(0.75 * shift, abs=0.8)
        labels, masks = relabelled(model, shift)
        assert torch.equal(labels, masks) != bool(corrects)


def test_a_network_that_does_not_know_the_drawn_masks_yet_is_not_taken_for_annotators_errors() -> None:
    model = model_of()
    found = learn(model, range(LEAST_STEPS + 5), 4.0, young=4.0)
    assert found["labels/corrects"] == 0 and abs(found["labels/gain"]) < 0.02
    assert found["labels/shift"].item() == pytest.approx(3.0, abs=0.8)
    assert learn(model, range(50, 80), 4.0, young=1.0)["labels/corrects"] == 1


def test_what_half_of_the_clean_images_happen_to_share_is_no_error_of_the_annotators() -> None:
    """One half is seen too small, the other too large: a shift that is fitted to either harms the other."""
    model = model_of(least_gain=0.0)
    for step in range(LEAST_STEPS + 5):
        masks, logits = truth_and_logits(step, 0.0)
        clean, clean_logits = truth_and_logits(step + 100, 0.0)
        clean_logits[:, 1] += torch.where(SECOND, 3.0, -3.0)[:, None, None]
        held_out = HeldOut(clean_logits, clean, FOLD, NOBODY)
        found = model.learn(model.correct(logits, masks, model.bins(masks), held_out)[1], NO, 0.1)
    assert found["labels/gain"] < -0.05 and model.corrects == 0


def too_small(masks: Tensor) -> Tensor:
    """As an annotator draws them who leaves out a rim of two pixels."""
    outside = (masks == 0).float()[:, None]
    return (torch.nn.functional.max_pool2d(outside, 5, 1, 2) == 0)[:, 0].to(masks.dtype)


def discs(seed: int, shrunk: float = 1.0, rim: float = 0.0) -> tuple[Tensor, Tensor]:
    """Of radii from 6 to 26 pixels, drawn without a rim, or with as much less of each; and how deep a pixel lies."""
    generator = torch.Generator().manual_seed(seed)
    radius = 6 + 20 * torch.rand(8, 1, 1, generator=generator, dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    depth = shrunk * radius - rim - ((rows - 32) ** 2 + (columns - 32) ** 2).sqrt()
    return (depth > 0).to(torch.uint8), depth


@pytest.mark.parametrize(("errors", "of_frame"), [({"rim": 4.0}, 1), ({"shrunk": 0.738}, 0)])
def test_objects_that_grow_with_the_networks_as_references_do_tell_pixels_from_sizes(errors, of_frame: int) -> None:
    """The network knows what annotators draw, with noise. Either kind of correction is the one that fits them."""
    model, wrong = model_of(), []
    for step in range(LEAST_STEPS + 25):
        (truth, _), (clean, _) = discs(step), discs(step + 1000)
        (masks, depth), (_, clean_depth) = discs(step, **errors), discs(step + 1000, **errors)
        noise = torch.randn(2, *depth.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        logits, clean_logits = (torch.stack([depth, clean_depth]) / 3 + noise)[:, :, None]
        held_out = HeldOut(clean_logits, clean, FOLD, torch.full_like(clean, 255))
        labels, evidence = model.correct(logits, masks, model.bins(masks), held_out)
        model.of_frame = 1 - model.of_frame
        others = model.correct(logits, masks, model.bins(masks), None)[0]
        model.of_frame = 1 - model.of_frame
        found = model.learn(evidence, NO, 0.1)
        areas = truth.sum((1, 2))
        wrong.append([((each != truth).sum((1, 2)) / areas).mean().item() for each in (masks, labels, others)])
    assert found["labels/corrects"] == 1 and found["labels/of_frame"] == of_frame
    drawn, learned, other = np.mean(wrong[LEAST_STEPS + 10 :], 0)
    assert learned < 0.6 * drawn and learned < 0.9 * other


def test_clean_images_that_are_annotated_too_say_whether_labels_get_better_and_are_asked_again() -> None:
    """The network knows the truth, with noise. Annotators leave out the rim; later they are right, and are trusted."""
    model = Corrected(torch.device("cpu"), 2, 4, 0.0, LEAST_STEPS, paired=True)

    def step(seed: int, annotator) -> dict[str, Tensor]:
        (truth, logits), (clean, clean_logits) = (truth_and_logits(each, 0.0) for each in (seed, seed + 100))
        masks = annotator(truth)
        drawn = torch.where(SECOND[:, None, None] & (torch.arange(8) > 3)[:, None, None], 255, annotator(clean))
        held_out = HeldOut(clean_logits, clean, FOLD, drawn)
        labels, evidence = model.correct(logits, masks, model.bins(masks), held_out)
        assert evidence[-3] == 6, "two images are not annotated"
        wrong = (labels != truth).double().mean(), (masks != truth).double().mean()
        return model.learn(evidence, NO, 0.1) | {"learned": wrong[0], "drawn": wrong[1]}

    for seed in range(LEAST_STEPS + 5):
        found = step(seed, too_small)
    assert found["labels/corrects"] == 1 and found["labels/gain"] > 0.1 and found["learned"] < found["drawn"]
    for seed in range(50, 90):
        found = step(seed, lambda truth: truth)
    assert found["labels/corrects"] == 0 and found["labels/gain"] < 0 and found["learned"] == 0


def test_it_is_decided_after_so_many_steps_and_for_good() -> None:
    model = model_of()
    assert learn(model, range(LEAST_STEPS - 1), 4.0)["labels/corrects"] == 0
    assert torch.equal(*relabelled(model, 4.0))
    assert learn(model, range(50, 51), 4.0)["labels/corrects"] == 1
    assert learn(model, range(60, 100), 0.0)["labels/corrects"] == 1, (
        "corrected labels take the shift away; that is no reason"
    )
    other = model_of()
    assert learn(other, range(LEAST_STEPS + 10), 0.0)["labels/corrects"] == 0
    assert learn(other, range(60, 100), 4.0)["labels/corrects"] == 1, "a shift may show later"


def test_without_held_out_images_the_calibration_stays_and_nothing_is_decided() -> None:
    model = model_of()
    learn(model, range(3), 4.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learn(model, range(3, 40), 4.0, held_out=False)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {"counts"}


@pytest.mark.parametrize("fault", ["skipped", "noisy", "clean"])
def test_a_step_that_is_skipped_or_not_finite_leaves_all_of_the_state(fault: str) -> None:
    model = model_of()
    learn(model, range(LEAST_STEPS - 1), 4.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks, logits = truth_and_logits(1, 4.0)
    clean_logits = logits.clone()
    {"skipped": logits, "noisy": logits, "clean": clean_logits}[fault][0, 0, 0, 0] = torch.nan
    _, evidence = model.correct(logits, masks, model.bins(masks), HeldOut(clean_logits, masks, FOLD, NOBODY))
    if fault == "skipped":
        evidence = torch.zeros_like(evidence)
    model.learn(evidence, YES if fault == "skipped" else NO, 0.1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("found", "changes"), [(0.0, False), (0.5, False), (0.7, True), (1.0, True)])
def test_an_image_whose_object_the_network_misses_keeps_its_mask(found: float, changes: bool) -> None:
    """The network is sure of each pixel: of the drawn object it finds this much, and something beside it."""
    model = model_of(least_gain=-1)
    learn(model, range(LEAST_STEPS), 4.0)
    masks = torch.zeros(2, SIDE, SIDE, dtype=torch.uint8)
    masks[:, 2:12, 2:12] = 1
    seen = masks > 0
    seen[0, 2 + round(10 * found) : 12] = False
    seen[:, 20:22, 2:12] = True
    logits = torch.where(seen, 40.0, -40.0)[:, None]
    labels, _ = model.correct(logits, masks, model.bins(masks), None)
    expected = torch.stack([seen[0].byte() if changes else masks[0], seen[1].byte()])
    assert torch.equal(labels, expected)


def test_two_classes_as_one_and_as_two_logits_are_equal() -> None:
    models = model_of(), model_of()
    for seed in range(LEAST_STEPS + 3):
        masks, logits = truth_and_logits(seed, 0.0)
        clean, clean_logits = truth_and_logits(seed + 100, 4.0)
        for model, channels in zip(models, ("two", "one"), strict=True):
            z, clean_z = (
                each if channels == "two" else (each[:, 1] - each[:, 0])[:, None] for each in (logits, clean_logits)
            )
            _, evidence = model.correct(z, masks, model.bins(masks), HeldOut(clean_z, clean, FOLD, NOBODY))
            model.learn(evidence, NO, 0.1)
    assert models[0].corrects == 1
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    masks, logits = truth_and_logits(1000, 4.0)
    bins = models[0].bins(masks)
    labels = [
        models[0].correct(logits, masks, bins, None)[0],
        models[1].correct((logits[:, 1] - logits[:, 0])[:, None], masks, bins, None)[0],
    ]
    assert torch.equal(*labels) and not torch.equal(labels[0], masks)


def test_three_classes_by_their_formula() -> None:
    """argmax of a·z + b + log P(m | c), written out; P(m | c) from counts of what is expected of each bin."""
    model = model_of(3)
    learn(model, range(LEAST_STEPS), 4.0)
    masks, logits = truth_and_logits(1000, 4.0, 3)
    masks[0, :2] = 255
    bins = signed_distance_bins(masks, 3).numpy()
    a, *b = model.theta[0].numpy()
    z = logits.numpy() - logits.numpy()[:, :1]
    calibrated = a * z + np.array([0, *b])[:, None, None]
    counts = model.counts[0].numpy()
    smoothed = counts + SMOOTHING * counts.sum(1, keepdims=True) / counts.shape[1]
    likelihood = np.log(smoothed / smoothed.sum(1, keepdims=True))
    expected = masks.numpy().copy()
    posterior = np.zeros_like(z)
    for image, row, column in np.ndindex(*masks.shape):
        if expected[image, row, column] == 255:
            continue
        joint = calibrated[image, :, row, column] + likelihood[:, bins[image, row, column]]
        posterior[image, :, row, column] = np.exp(joint) / np.exp(joint).sum()
        expected[image, row, column] = joint.argmax()
    by_object = torch.as_tensor(bins)
    actual, evidence = model.correct(logits, masks, (by_object, torch.zeros_like(by_object)), None)
    assert torch.equal(actual, torch.as_tensor(expected)) and 0 < (actual != masks).double().mean() < 0.5

    size = counts.shape[1]
    wanted = np.zeros((3, size))
    for image, row, column in np.argwhere(masks.numpy() != 255):
        wanted[:, bins[image, row, column]] += posterior[image, :, row, column]
    np.testing.assert_allclose(evidence.view(2, 3, size)[0], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_waits_for_the_device(backend: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without data whoever looks at a number raises; tests/gpu has the same with data."""
    from distseg import kernels

    launched = []
    for name in ("row_distances_kernel", "edges_kernel", "bins_kernel", "correct_kernel"):
        monkeypatch.setattr(kernels, name, _Launches(name, launched))
    nowhere = torch.device("meta")
    model = Corrected(nowhere, max(2, channels), 8, 0.05, LEAST_STEPS)
    logits = torch.randn(4, channels, 16, 16, device=nowhere)
    masks = torch.zeros(4, 16, 16, dtype=torch.uint8, device=nowhere)
    fold = torch.zeros(4, dtype=torch.int64, device=nowhere)
    for held_out in (HeldOut(logits, masks, fold, masks), None):
        with ops.using(backend):
            labels, evidence = model.correct(logits, masks, model.bins(masks), held_out)
        found = model.learn(evidence, torch.zeros((), dtype=torch.bool, device=nowhere), 0.1)
        assert labels.shape == masks.shape and all(each.device == nowhere for each in (labels, *found.values()))
    assert len(launched) == (16 if backend == "triton" else 0)


class _Launches:
    """Stands for a kernel: launching it is written down."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *arguments, **constants: self.launched.append(self.name)


def test_more_classes_than_bins_are_refused_before_training() -> None:
    context = SimpleNamespace(classes=42, steps=10, device=torch.device("cpu"), clean=[], paired=[], annotators=None)
    with pytest.raises(UserError, match=r"at most 41 classes, and data.classes has 42; set method.labels=drawn"):
        CorrectedConfig().build(context)
    context.classes = 41
    bins = CorrectedConfig().build(context).bins(torch.full((1, 3, 3), 40, dtype=torch.uint8))
    assert [each.unique().item() for each in bins] == [250, 250]
