"""The label model from all masks at once: it finds how each of several annotators errs."""

import torch

from distseg.labels.calibration import calibrated, relative_logits
from distseg.labels.distances import drawn_class, signed_distance_bins
from distseg.labels.fitting import Marked, fit_calibration, fit_counts


def examples(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative logits (n, 2, 24, 24) that are half as sure as they should be and one too low, and true masks."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    radius = torch.rand(count, generator=generator) * 4 + 5
    lesion = radius[:, None, None] - (rows - 11.5).hypot(columns - 11.5)
    truth = (torch.rand(lesion.shape, generator=generator) < lesion.sigmoid()).byte()
    return relative_logits((0.5 * lesion - 1)[:, None]), truth


def test_the_calibration_undoes_scale_and_shift() -> None:
    logits, truth = examples(40, 0)
    theta = fit_calibration([(logits[n : n + 1], truth[n : n + 1]) for n in range(40)], 2)
    assert torch.allclose(theta, torch.tensor([2.0, 2.0], dtype=torch.float64), atol=0.2)
    assert fit_calibration([], 2).tolist() == [1.0, 0.0]


def test_who_misses_a_quarter_of_the_pixels_is_told_from_who_does_not() -> None:
    logits, truth = examples(60, 1)
    generator = torch.Generator().manual_seed(2)
    careless = truth * (torch.rand(truth.shape, generator=generator) > 0.25)
    blocks = []
    for name, drawn in (("careful", truth), ("careless", careless)):
        half = slice(0, 30) if name == "careful" else slice(30, 60)
        calibrated_logits = calibrated(logits[half], torch.tensor([2.0, 2.0], dtype=torch.float64))
        bins = signed_distance_bins(drawn[half])
        flat = calibrated_logits.movedim(1, 0).flatten(1)
        blocks.append(Marked((name,), flat, bins.flatten()[None]))
    counts = fit_counts(blocks, 2)
    drawn = drawn_class(2, torch.device("cpu"))
    missed = {name: (each[1, drawn == 0].sum() / each[1].sum()).item() for name, each in counts.items()}
    # Half an observation leaves some of the network's doubt to both.
    assert missed["careful"] < 0.25
    assert 0.1 < missed["careless"] - missed["careful"] < 0.3
    assert [round(each.sum().item()) for each in counts.values()] == [30 * 576, 30 * 576]


def test_who_ignores_a_pixel_says_nothing_of_it() -> None:
    logits = torch.zeros(2, 3)
    bins = torch.tensor([[12, 255, 0]], dtype=torch.uint8)
    counts = {"a": torch.ones(2, 18, dtype=torch.float64)}
    counts["a"][1, 12] = 50
    posterior = Marked(("a",), logits, bins).posterior(counts, 0.5)
    assert posterior[1, 0] > posterior[0, 0] + 0.5
    assert posterior[:, 1].tolist() == [0, 0]
