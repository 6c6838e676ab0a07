"""Which images a preset takes, that its weights are a mean over the global batch, and what it learns and when."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distseg.methods.config import MethodConfig
from distseg.methods.labels.averages import averaged
from distseg.methods.learned import Learned
from distseg.methods.method import Method
from distseg.methods.presets import PRESETS
from distseg.methods.step import MicroBatch, Step
from distseg.ops import weighted_loss

STEPS = 10
NO, YES = torch.tensor(False), torch.tensor(True)
LEARNERS = [("meta_weight_net", {}), ("t_loss", {}), ("label_correction", {"warm_up": 0.1})]


def ids_of(method: Method, step: int) -> list[str]:
    return [i for micro in method.begin(step, diagnose=False).micro_batches for i in micro.batch.ids]


def full(micro: MicroBatch) -> Tensor:
    return micro.weights.full(micro.batch.masks)


def run(step: Step, network, skipped: Tensor = NO, lr: float = 0.1) -> dict[str, Tensor]:
    for k, micro in enumerate(step.micro_batches):
        step.loss(k, network(micro.batch.images))
    return step.finish(skipped, lr)


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"meta_weight_net"}))
def test_weights_are_a_mean_over_the_micro_batches(build: Callable, name: str) -> None:
    step = build(name).method.begin(0, diagnose=False)
    assert len(step.micro_batches) == 2
    maps = [full(micro) for micro in step.micro_batches]
    assert all(micro.batch.masks.shape == (4, 16, 16) for micro in step.micro_batches)
    assert all((weights >= 0).all() for weights in maps)
    assert sum(weights.sum().item() for weights in maps) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_a_loss_may_be_asked_for_twice(build: Callable, name: str) -> None:
    """And in any order: the step then ends as if it had been asked for once."""
    once, twice = build(name), build(name)
    for index in (0, 5, 9):
        first, second = (each.method.begin(index, diagnose=True) for each in (once, twice))
        losses = []
        for k in (1, 0, 1, 0):
            losses.append(second.loss(k, once.network(second.micro_batches[k].batch.images)))
        assert torch.equal(losses[0], losses[2]) and torch.equal(losses[1], losses[3])
        expected, actual = run(first, once.network), second.finish(NO, 0.1)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[key], actual[key]) for key in expected if not expected[key].isnan())
    expected, actual = once.method.state_dict(), twice.method.state_dict()
    assert expected.keys() == actual.keys() and all(torch.equal(expected[key], actual[key]) for key in expected)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_skipped_step_leaves_the_method_as_it_was(build: Callable, name: str, value: float) -> None:
    built = build(name, **({"warm_up": 0.1} if name == "label_correction" else {}))
    for index in range(3):
        before = built.method.state_dict()
        before = {key: tensor.clone() for key, tensor in before.items()}
        run(built.method.begin(index, diagnose=True), lambda images: built.network(images) * value, skipped=YES)
        after = built.method.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before), index
        run(built.method.begin(index, diagnose=False), built.network)
    assert (name in dict(LEARNERS)) == bool(before)


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_that_is_only_begun_changes_nothing(build: Callable, name: str) -> None:
    method = build(name).method
    before = {key: tensor.clone() for key, tensor in method.state_dict().items()}
    method.begin(0, diagnose=True)
    assert all(torch.equal(before[key], tensor) for key, tensor in method.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options"), [(name, {}) for name in PRESETS] + [("pixel_reweight", {"labels": "corrected"})]
)
def test_diagnosis_changes_nothing(build: Callable, name: str, options: dict) -> None:
    ends = []
    for diagnose in (False, True):
        built = build(name, **options)
        for index in range(STEPS):
            step = built.method.begin(index, diagnose)
            maps = [full(micro) for micro in step.micro_batches]
            losses = [step.loss(k, built.network(m.batch.images)) for k, m in enumerate(step.micro_batches)]
            step.finish(NO, 0.1)
        ends.append([*maps, *losses, *built.method.state_dict().values()])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def test_each_preset_takes_the_images_of_its_streams(build: Callable) -> None:
    built = build("noisy_only")
    assert set(ids_of(built.method, 0)) <= built.noisy
    built = build("clean_only")
    assert set(ids_of(built.method, 0)) <= built.clean
    built = build("union")
    ids = ids_of(built.method, 0)
    assert sum(i in built.clean for i in ids) == sum(i in built.noisy for i in ids) == 4
    built = build("oracle")
    assert {i for step in range(3) for i in ids_of(built.method, step)} == built.noisy | built.clean
    built = build("pixel_reweight")
    assert set(ids_of(built.method, 0)) <= built.noisy


@pytest.mark.parametrize("name", PRESETS)
def test_needs_clean_and_needs_noisy_are_what_the_streams_say(build: Callable, name: str) -> None:
    opened = build(name).opened
    config = MethodConfig.model_validate({"name": name})
    assert (config.needs_clean, config.needs_noisy) == ("clean" in opened, "noisy" in opened)


@pytest.mark.parametrize("method", [{}, {"weighting": "aligned"}])
def test_masks_that_are_references_are_not_corrected_and_nothing_is_learned_from_them(
    build: Callable, method: dict
) -> None:
    """Of half the noisy images the mask is a reference: they are trusted, and the counts are those of the others."""
    built = build("label_correction", warm_up=0.0, picked=True, **method)
    model = built.method.label_model
    model.corrects.fill_(1)
    run(built.method.begin(0, diagnose=False), lambda images: torch.full((len(images), 1, 16, 16), 3.0))
    model.theta[0].copy_(torch.tensor([1.0, 2.0]))
    model.counts.fill_(1)  # masks say little
    before = model.counts.clone()
    step = built.method.begin(1, diagnose=False)
    changed, expected = 0, torch.zeros_like(before)
    for k, micro in enumerate(step.micro_batches):
        logits = torch.randn(4, 1, 16, 16)
        masks, trusted = micro.batch.masks, torch.tensor([i in built.method.trusted for i in micro.batch.ids])
        assert trusted.any() and not trusted.all(), "both kinds are in each micro-batch, or nothing is tested"
        judged = built.network(micro.batch.images) if micro.drawn.labels is not None else logits
        alone, _ = model.correct(judged[~trusted], masks[~trusted], model.bins(masks[~trusted]), None)
        labels = masks.clone()
        labels[~trusted] = alone
        changed += (labels != masks).sum().item()
        expected += model.correct(logits[~trusted], masks[~trusted], model.bins(masks[~trusted]), None)[1].view_as(
            before
        )
        torch.testing.assert_close(step.loss(k, logits), weighted_loss(logits, labels, *micro.weights))
    assert changed > 0, "nothing was corrected, so nothing was tested"
    step.finish(NO, 0.1)
    torch.testing.assert_close(model.counts, averaged(before, expected))


def test_clean_images_are_held_out_with_what_annotators_have_drawn_of_them(build: Callable) -> None:
    """Half of them have a drawn mask, which is another image's here; with four such, labels are judged by them."""
    for paired in (2, 4):
        method = build("label_correction", warm_up=0.0, paired=paired).method
        assert method.label_model.paired == (paired == 4) and len(method.paired) == paired
        [*_, batch] = [each.batch(0, 0) for each in (method.phases.at(0).noisy, method.phases.at(0).held_out)]
        held_out = method.begin(0, diagnose=False).micro_batches[0].drawn.held_out
        for k, id in enumerate(batch.ids):
            assert held_out.fold[k] == method.folds[id]
            assert torch.equal(held_out.masks[k], batch.true_masks[k])
            drawn = torch.full_like(batch.masks[k], 255) if id not in method.paired else batch.masks[k]
            assert torch.equal(held_out.drawn[k], drawn)
        assert not torch.equal(batch.masks, batch.true_masks)
    assert sorted(method.folds.values()) == [0, 1, 2, 3]


def test_finetune_turns_to_the_clean_images_for_the_last_part(build: Callable) -> None:
    built = build("finetune", clean_phase=0.3)
    assert [set(ids_of(built.method, step)) <= built.noisy for step in (0, 6)] == [True, True]
    assert [set(ids_of(built.method, step)) <= built.clean for step in (7, 9)] == [True, True]


@pytest.mark.parametrize("name", ["image_reweight", "pixel_reweight"])
def test_weights_may_be_framed_by_two_uniform_phases(build: Callable, name: str) -> None:
    """10 steps: warm-up 0 and 1, weighted 2 to 6, clean 7 to 9."""
    built = build(name, warm_up=0.2, clean_phase=0.3, include_clean=True)
    both = built.noisy | built.clean
    cases = [(0, built.noisy, False), (1, built.noisy, False), (2, both, True), (6, both, True)]
    for index, streams, weighs in [*cases, (7, built.clean, False), (9, built.clean, False)]:
        step = built.method.begin(index, diagnose=True)
        ids = {i for micro in step.micro_batches for i in micro.batch.ids}
        assert ids <= streams and all(ids & part for part in (built.noisy, built.clean) if part <= streams), index
        maps = torch.cat([full(micro) for micro in step.micro_batches])
        assert maps.sum().item() == pytest.approx(1, abs=1e-5), index
        assert (maps.unique().numel() == 1) != weighs, index
        assert ("auroc" in run(step, built.network)) == weighs, index


def test_corrected_labels_are_learned_from_and_the_clean_ones_stay(build: Callable) -> None:
    """Of 10 steps 0 and 1 are warm-up, 2 to 4 hold the clean images out, and 9 has them alone."""
    built = build("label_correction", warm_up=0.2, held_out=0.3, clean_phase=0.1, clean_share=0.4)
    model = built.method.label_model
    model.corrects.fill_(1)
    changed = 0
    for index in range(STEPS):
        step = built.method.begin(index, diagnose=True)
        ids = {i for micro in step.micro_batches for i in micro.batch.ids}
        assert (bool(ids & built.noisy), bool(ids & built.clean)) == (index < 9, index >= 5)
        assert sum(full(micro).sum().item() for micro in step.micro_batches) == pytest.approx(1, abs=1e-5)
        drawn_wrong = left_wrong = count = 0
        for k, micro in enumerate(step.micro_batches):
            masks, truth = micro.batch.masks, micro.batch.true_masks
            logits = 3 * micro.batch.images[:, :1]
            labels = masks.clone()
            if 2 <= index < 9:
                labels[:4], _ = model.correct(logits[:4], masks[:4], micro.drawn.bins, None)
                changed += (labels != masks).sum().item()
            if 5 <= index < 9:
                assert full(micro)[4:].sum() / full(micro).sum() == pytest.approx(0.4, abs=1e-5)
            torch.testing.assert_close(step.loss(k, logits), weighted_loss(logits, labels, *micro.weights))
            if 2 <= index < 9:
                drawn_wrong += (masks != truth)[:4].sum().item()
                left_wrong += (labels != truth)[:4].sum().item()
                count += masks[:4].numel()
        diagnostics = step.finish(NO, 0.1)
        if 2 <= index < 9:
            assert diagnostics["noise_rate"].item() == pytest.approx(drawn_wrong / count)
            assert diagnostics["corrected_noise_rate"].item() == pytest.approx(left_wrong / count)
        else:
            assert diagnostics == {}
    assert changed > 0, "nothing was corrected, so nothing was tested"
    assert model.known == 3


def test_weights_on_corrected_labels_are_those_of_the_corrected_labels(build: Callable) -> None:
    """The labels that the weights were computed with are the ones that the loss takes."""
    built = build("pixel_reweight", labels="corrected")
    drawn = build("pixel_reweight")
    built.method.label_model.corrects.fill_(1)
    run(built.method.begin(0, diagnose=False), lambda images: torch.full((len(images), 1, 16, 16), 3.0))
    built.method.label_model.counts.fill_(1)  # masks say nothing
    built.method.label_model.theta[0].copy_(torch.tensor([1.0, 2.0]))  # and the network finds objects in many places
    step, plain = (each.method.begin(1, diagnose=False) for each in (built, drawn))
    changed = 0
    for k, micro in enumerate(step.micro_batches):
        logits = built.network(micro.batch.images)
        labels, _ = built.method.label_model.correct(logits, micro.batch.masks, micro.drawn.bins, None)
        assert torch.equal(micro.drawn.labels, labels)
        logits = torch.randn(4, 1, 16, 16)
        torch.testing.assert_close(step.loss(k, logits), weighted_loss(logits, labels, *micro.weights))
        changed += (labels != micro.batch.masks).sum().item()
    assert changed > 0, "nothing was corrected, so nothing was tested"
    assert not torch.equal(full(step.micro_batches[0]), full(plain.micro_batches[0]))


def test_finetune_may_have_another_loss(build: Callable) -> None:
    built, plain = build("finetune", loss={"kind": "generalised_cross_entropy", "q": 1.0}), build("finetune")
    for index in (0, 9):
        steps = [each.method.begin(index, diagnose=False) for each in (built, plain)]
        logits = built.network(steps[0].micro_batches[0].batch.images)
        bounded, usual = (step.loss(0, logits) for step in steps)
        assert bounded < usual, "with q = 1 it is the mean absolute error, which is below −log p"


def test_image_reweight_gives_an_image_one_weight(build: Callable) -> None:
    for micro in build("image_reweight").method.begin(0, diagnose=False).micro_batches:
        assert all(weights.unique().numel() == 1 for weights in full(micro))


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_include_clean_takes_its_share_of_the_weight(build: Callable, share: float) -> None:
    built = build("pixel_reweight", include_clean=True, clean_share=share)
    step = built.method.begin(0, diagnose=True)
    for micro in step.micro_batches:
        assert full(micro).shape == (4 + 3, 16, 16)
        assert set(micro.batch.ids[:4]) <= built.noisy and set(micro.batch.ids[4:]) <= built.clean
        assert full(micro)[4:].unique().numel() == 1
    noisy, clean = (sum(full(m)[part].sum().item() for m in step.micro_batches) for part in (slice(4), slice(4, None)))
    assert (noisy, clean) == (pytest.approx(1 - share, abs=1e-5), pytest.approx(share, abs=1e-5))
    assert {"gradient_norm", "wrong_mass", "auroc"} <= run(step, built.network).keys()


def test_meta_weight_net_weighs_by_the_loss_and_sums_to_the_mean_weight(build: Callable) -> None:
    built = build("meta_weight_net")
    before = built.method.state_dict()
    step = built.method.begin(0, diagnose=True)
    total = sum(full(micro).sum().item() for micro in step.micro_batches)
    diagnostics = run(step, built.network)
    assert 0 < total < 1 and diagnostics["mean_weight"].item() == pytest.approx(total, abs=1e-6)
    assert {"wrong_mass", "auroc", "noise_rate"} <= diagnostics.keys()
    assert set(step.micro_batches[0].batch.ids) <= built.noisy
    assert not any(
        torch.equal(before[key], value) for key, value in built.method.state_dict().items() if "param" in key
    )


@pytest.mark.parametrize(("name", "options"), LEARNERS)
def test_a_method_that_learns_goes_on_from_its_state(build: Callable, tmp_path: Path, name: str, options: dict) -> None:
    def steps(built, numbers: range) -> None:
        for index in numbers:
            run(built.method.begin(index, diagnose=False), lambda x, i=index: x.mean(1, keepdim=True) * (1 + i))

    whole, first, second = (build(name, **options) for _ in range(3))
    initial = {key: value.clone() for key, value in whole.method.state_dict().items()}
    steps(whole, range(4))
    steps(first, range(2))
    save_file(first.method.state_dict(), tmp_path / "method.safetensors")
    second.method.load_state_dict(load_file(tmp_path / "method.safetensors"))
    steps(second, range(2, 4))
    expected, actual = whole.method.state_dict(), second.method.state_dict()
    assert expected.keys() == actual.keys() == initial.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    assert any(not torch.equal(expected[key], initial[key]) for key in expected)


@pytest.mark.parametrize(("name", "options"), LEARNERS)
def test_state_is_loaded_onto_the_device_that_the_method_is_on(build: Callable, name: str, options: dict) -> None:
    """A checkpoint is read on the CPU. The meta device stands for a GPU: no operator takes tensors of both."""
    method = build(name, **options).method
    state = method.state_dict()
    parts = {
        "meta_weight_net": lambda: method.weighting.learned,
        "t_loss": lambda: method.loss.learned,
        "label_correction": lambda: method.label_model,
    }
    part = parts[name]()
    if isinstance(part, Learned):
        moved = part.module.to("meta")
        part.__init__(moved, lr=0.1)
    else:
        for key in part.state_dict():
            setattr(part, key, getattr(part, key).to("meta"))
    method.load_state_dict(state)
    assert {value.device.type for value in method.state_dict().values()} == {"meta"}


def test_t_loss_learns_nu_towards_the_likelihood(build: Callable) -> None:
    """At the maximum of the likelihood of images that fit as badly as the first batch, ν stands still."""
    built = build("t_loss")
    values = []
    for _ in range(30):
        step = built.method.begin(0, diagnose=False)
        values.append(sum(step.loss(k, torch.zeros(4, 1, 16, 16)).item() for k in range(2)))
        nu = step.finish(NO, 0.1)["nu"]
    assert values[-1] < values[0]
    assert nu.item() != pytest.approx(1.0, abs=0.1)


def test_a_gradient_that_is_not_finite_is_not_learned_from() -> None:
    module = torch.nn.ParameterDict({"p": torch.nn.Parameter(torch.zeros(2))})
    learned = Learned(module, lr=0.1)
    before = learned.state_dict()
    learned.adopt(learned.stepped([torch.tensor([1.0, float("nan")])]), unless=NO)
    assert all(torch.equal(before[key], value) for key, value in learned.state_dict().items())
    learned.adopt(learned.stepped([torch.ones(2)]), unless=YES)
    assert all(torch.equal(before[key], value) for key, value in learned.state_dict().items())
    learned.adopt(learned.stepped([torch.ones(2)]), unless=NO)
    assert (module["p"] < 0).all()
