import numpy as np
import pytest
import torch

from distseg.evaluation.intervals import paired_difference
from distseg.evaluation.metrics import (
    SCORES,
    class_confusion,
    class_scores,
    confusion,
    count_predictions,
    counts_csv,
    image_scores,
    never_predicted,
    read_counts_csv,
    summarise,
)


def test_confusion_counts_each_image_and_leaves_ignored_pixels_out():
    prediction = torch.tensor([[[1, 1, 0], [0, 1, 0]], [[0, 0, 0], [0, 0, 1]]], dtype=torch.bool)
    truth = torch.tensor([[[1, 0, 3], [0, 255, 255]], [[0, 0, 0], [0, 0, 2]]], dtype=torch.uint8)

    actual = confusion(prediction, truth)

    assert actual.dtype == torch.int64
    assert actual.tolist() == [[1, 1, 1, 1], [1, 0, 0, 5]]
    assert confusion(prediction, truth.long()).tolist() == actual.tolist()


def test_confusion_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="must be equal"):
        confusion(torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(1, 4, 4, dtype=torch.uint8))


def test_scores_by_hand():
    scores = image_scores(np.array([[6, 2, 4, 8]]))

    assert {name: values.item() for name, values in scores.items()} == pytest.approx(
        {"dice": 12 / 18, "jaccard": 6 / 12, "sensitivity": 6 / 10, "specificity": 8 / 10, "accuracy": 14 / 20}
    )
    assert tuple(scores) == SCORES


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([0, 0, 0, 9], {"dice": 1, "jaccard": 1, "sensitivity": 1, "specificity": 1, "accuracy": 1}),
        ([0, 3, 0, 6], {"dice": 0, "jaccard": 0, "sensitivity": 1, "specificity": 6 / 9, "accuracy": 6 / 9}),
        ([9, 0, 0, 0], {"dice": 1, "jaccard": 1, "sensitivity": 1, "specificity": 1, "accuracy": 1}),
        ([0, 0, 9, 0], {"dice": 0, "jaccard": 0, "sensitivity": 0, "specificity": 1, "accuracy": 0}),
        ([0, 0, 0, 0], {"dice": 1, "jaccard": 1, "sensitivity": 1, "specificity": 1, "accuracy": 1}),
    ],
    ids=["empty truth, empty prediction", "empty truth", "truth everywhere", "all missed", "all ignored"],
)
def test_scores_without_a_denominator(counts, expected):
    scores = image_scores(np.array([counts]))

    assert {name: values.item() for name, values in scores.items()} == pytest.approx(expected)


def random_counts(images: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 50, size=(images, 4))


def test_bootstrap_interval_equals_a_loop_over_resamples():
    counts = random_counts(images=23)

    actual = summarise(counts, "test", seed=3, resamples=200)

    chosen = np.random.default_rng(3).integers(23, size=(200, 23))
    for name in SCORES:
        means = sorted(float(np.mean([image_scores(counts[[i]])[name][0] for i in resample])) for resample in chosen)
        assert actual[f"test/{name}_low"] == pytest.approx(np.quantile(means, 0.025), abs=1e-12)
        assert actual[f"test/{name}_high"] == pytest.approx(np.quantile(means, 0.975), abs=1e-12)
        assert actual[f"test/{name}"] == pytest.approx(image_scores(counts)[name].mean(), abs=1e-12)
    assert len(actual) == 3 * len(SCORES)
    assert all(type(value) is float for value in actual.values())


def test_bootstrap_interval_has_the_width_that_the_normal_theory_gives():
    counts = random_counts(images=400)
    dice = image_scores(counts)["dice"]

    summary = summarise(counts, "val")

    expected = 2 * 1.96 * dice.std() / np.sqrt(len(dice))
    assert summary["val/dice_high"] - summary["val/dice_low"] == pytest.approx(expected, rel=0.1)
    assert summary["val/dice_low"] < dice.mean() < summary["val/dice_high"]


def test_summary_depends_on_the_seed_alone():
    counts = random_counts(images=30)

    assert summarise(counts, "test", seed=1) == summarise(counts, "test", seed=1)
    assert summarise(counts, "test", seed=1) != summarise(counts, "test", seed=2)


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="test: no images"):
        summarise(np.zeros((0, 4), dtype=np.int64), "test")


def test_counts_survive_the_csv():
    counts = np.array([[1, 2, 3, 4], [0, 0, 0, 9]])
    ids, read, _ = read_counts_csv(counts_csv(["ISIC_1", "with, comma"], counts))
    assert ids == ["ISIC_1", "with, comma"]
    np.testing.assert_array_equal(read, counts)


def test_paired_difference_sees_through_what_the_images_share():
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 1, 200)  # how hard an image is swamps the difference between the methods
    reference, scores = hard, hard + 0.01 + rng.normal(0, 0.02, 200)
    mean, low, high, p = paired_difference(scores, reference)
    expected = (scores - reference).mean()
    error = (scores - reference).std(ddof=1) / np.sqrt(200)
    assert mean == pytest.approx(expected)
    assert [low, high] == pytest.approx([expected - 1.96 * error, expected + 1.96 * error], abs=5e-4)
    assert p < 0.001
    assert paired_difference(reference, scores)[:3] == pytest.approx((-mean, -high, -low))


def test_paired_difference_of_nothing_is_no_evidence():
    rng, rejected = np.random.default_rng(1), 0
    for _ in range(200):
        rejected += paired_difference(rng.normal(size=60), rng.normal(size=60), resamples=500)[3] < 0.05
    assert 1 <= rejected <= 22  # 10 expected
    assert paired_difference(np.ones(5), np.ones(5))[3] == 1.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "row 1"),
        ("name,tp,fp,fn,tn\na,1,2,3,4\n", "row 1"),
        ("id,tp,fp,fn,tn\na,1,2,3\n", "row 2"),
        ("id,tp,fp,fn,tn\na,1,2,3,4\nb,1,-2,3,4\n", "row 3"),
        ("id,tp,fp,fn,tn\na,1,2,3,9e9\n", "row 2"),
        ("id,tp,fp,fn,tn\na,1,2,3,99999999999999999999\n", "row 2"),
        ("id,tp,fp,fn,tn\na,1,2,3,4\na,1,2,3,4\n", "twice"),
    ],
)
def test_a_table_that_is_no_table_of_counts_is_refused_by_its_row(text: str, said: str):
    with pytest.raises(ValueError, match=said):
        read_counts_csv(text)


CLASSES = ("skin", "lesion", "hair", "ruler")


def of_classes(seed: int, images: int = 9, side: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted and true class ids; hair is missing from some masks, ruler from most, and some pixels are ignored."""
    rng = np.random.default_rng(seed)
    shares = [(0.5, 0.3, 0.15, 0.05), (0.7, 0.3, 0, 0), (1, 0, 0, 0)]
    truth = np.stack([rng.choice(4, (side, side), p=shares[i % 3]) for i in range(images)]).astype(np.uint8)
    predicted = np.where(rng.random(truth.shape) < 0.3, rng.integers(0, 4, truth.shape), truth)
    predicted[2] = 0
    truth[rng.random(truth.shape) < 0.1] = 255
    return torch.from_numpy(predicted), torch.from_numpy(truth)


def test_scores_of_classes_are_those_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    predicted, truth = of_classes(0)
    counts = class_confusion(predicted, truth, 4).numpy()
    actual = class_scores(counts)
    for image, (p, t) in enumerate(zip(predicted.numpy(), truth.numpy(), strict=True)):
        p, t = p[t != 255], t[t != 255]
        labels, kwargs = [1, 2, 3], {"average": None, "zero_division": 1.0}
        of_each = {
            "dice": sklearn.f1_score(t, p, labels=labels, **kwargs),
            "jaccard": sklearn.jaccard_score(t, p, labels=labels, **kwargs),
            "sensitivity": sklearn.recall_score(t, p, labels=labels, **kwargs),
            "specificity": [sklearn.recall_score(t != c, p != c, zero_division=1.0) for c in labels],
            "accuracy": [sklearn.accuracy_score(t == c, p == c) for c in labels],
        }
        for name, expected in of_each.items():
            np.testing.assert_allclose(actual[name][image], expected, atol=1e-12, err_msg=f"{name} of image {image}")
        table = sklearn.multilabel_confusion_matrix(t, p, labels=labels)
        cells = [table[:, true, positive] for true, positive in ((1, 1), (0, 1), (1, 0), (0, 0))]
        np.testing.assert_array_equal(counts[image], np.stack(cells, 1))


def test_macro_means_are_over_all_classes_but_background() -> None:
    counts = class_confusion(*of_classes(1), 4).numpy()
    scores, summary = class_scores(counts)["dice"], summarise(counts, "test", class_names=CLASSES)
    assert summary["test/dice"] == pytest.approx(scores.mean(axis=0).mean())
    assert [summary[f"test/dice/{name}"] for name in CLASSES[1:]] == pytest.approx(scores.mean(axis=0).tolist())
    assert "test/dice/skin" not in summary and len(summary) == 5 * 3 + 5 * 3
    np.testing.assert_allclose(image_scores(counts)["dice"], scores.mean(axis=1))
    assert summary["test/dice_low"] < summary["test/dice"] < summary["test/dice_high"]


def test_two_classes_are_counted_as_ever_and_three_logits_by_class() -> None:
    predicted, truth = of_classes(2)
    logits = torch.nn.functional.one_hot(predicted.long(), 4).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(count_predictions(logits, truth, 4), class_confusion(predicted, truth, 4))
    two = count_predictions(logits[:, :2], truth)
    torch.testing.assert_close(two, confusion(logits[:, :2].argmax(1) > 0, truth))
    torch.testing.assert_close(count_predictions(logits[:, 1:2] - 0.5, truth), confusion(predicted == 1, truth))


def test_classes_that_are_never_predicted_are_named() -> None:
    predicted, truth = of_classes(3)
    counts = class_confusion(torch.where(predicted == 2, 0, predicted), truth, 4).numpy()
    assert never_predicted(counts, CLASSES) == ["hair"]
    assert never_predicted(np.array([[0, 0, 3, 4], [0, 0, 0, 9]]), CLASSES[:2]) == ["lesion"]
    assert never_predicted(np.array([[0, 0, 3, 4], [0, 1, 0, 9]]), CLASSES[:2]) == []


def test_the_table_of_classes_is_read_back() -> None:
    counts = class_confusion(*of_classes(4), 4).numpy()
    ids = [f"with, comma {number}" for number in range(len(counts))]
    text = counts_csv(ids, counts, CLASSES)
    assert text.startswith("id,class,tp,fp,fn,tn\nwith, comma 0,lesion,")
    again, read, names = read_counts_csv(text)
    assert again == ids and names == list(CLASSES[1:])
    np.testing.assert_array_equal(read, counts)
    for damaged in (text.replace("0,hair", "0,lesion", 1), "\n".join(text.split("\n")[:-2]) + "\n"):
        with pytest.raises(ValueError, match="not every image has a row of every class"):
            read_counts_csv(damaged)
