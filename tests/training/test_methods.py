"""Each method draws from the streams that it should, and its weights are a mean over the global batch."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distseg.config.schema import Config
from distseg.data.manifest import Sample, read_samples, split_clean
from distseg.data.streams import Stream
from distseg.distributed.ranks import ShardSpec
from distseg.meta import PixelReweighter
from distseg.methods.config import MethodConfig
from distseg.methods.learned import Learned
from distseg.methods.registry import METHODS, build_method
from distseg.methods.step import Method, Parts, WeightedBatch
from distseg.ops import weighted_loss

STEPS = 10


def config_for(root: Path, name: str, **method) -> Config:
    return Config.model_validate(
        {
            "name": "x",
            "data": {"root": str(root), "image_size": 16, "clean_count": 4, "pipeline": "torch"},
            "method": {"name": name, **method},
            "train": {"steps": STEPS, "batch_size": 4, "clean_batch_size": 3, "accumulation": 2},
        }
    )


@pytest.fixture
def build(drawn_data: Path):
    streams: list[Stream] = []

    def make(name: str, **options) -> tuple[Method, set[str], set[str]]:
        config = config_for(drawn_data, name, **options)
        clean, noisy = split_clean(read_samples(config.data, 0), 4, 0)

        def open_stream(name: str, samples: list[Sample], labels: str, batch_size: int) -> Stream:
            device = torch.device("cpu")
            make.opened.add(name)
            streams.append(Stream(samples, labels, name, config.data, 0, ShardSpec(), batch_size, 2, device))
            return streams[-1]

        def reweighter(granularity: str, **rule) -> PixelReweighter:
            torch.manual_seed(0)
            return PixelReweighter(nn.Conv2d(3, 1, 3, padding=1), granularity=granularity, **rule)

        device = torch.device("cpu")
        method = build_method(Parts(config, noisy, clean, STEPS, open_stream, reweighter, lambda total: total, device))
        return method, {s.id for s in noisy}, {s.id for s in clean}

    make.opened = set()
    yield make
    for stream in streams:
        stream.close()


def drawn_ids(method: Method, step: int) -> list[str]:
    return [i for weighted in method.draw(step, diagnose=False)[0] for i in weighted.batch.ids]


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"meta_weight_net"}))
def test_weights_are_a_mean_over_the_micro_batches(build, name: str) -> None:
    method, *_ = build(name)
    batches, _ = method.draw(0, diagnose=False)
    assert len(batches) == 2
    maps = [full(b) for b in batches]
    assert all(b.batch.masks.shape == (4, 16, 16) for b in batches)
    assert all((weights >= 0).all() for weights in maps)
    assert sum(weights.sum().item() for weights in maps) == pytest.approx(1, abs=1e-5)


def full(weighted: WeightedBatch) -> Tensor:
    return weighted.weights.full(weighted.batch.masks)


def test_each_method_draws_from_its_streams(build) -> None:
    method, noisy, clean = build("noisy_only")
    assert set(drawn_ids(method, 0)) <= noisy
    method, *_ = build("clean_only")
    assert set(drawn_ids(method, 0)) <= clean
    method, *_ = build("union")
    ids = drawn_ids(method, 0)
    assert sum(i in clean for i in ids) == sum(i in noisy for i in ids) == 4
    method, *_ = build("oracle")
    assert {i for step in range(3) for i in drawn_ids(method, step)} == noisy | clean
    method, *_ = build("pixel_reweight")
    assert set(drawn_ids(method, 0)) <= noisy


def test_finetune_turns_to_the_clean_images_for_the_last_part(build) -> None:
    method, noisy, clean = build("finetune", clean_phase=0.3)
    assert [set(drawn_ids(method, step)) <= noisy for step in (0, 6)] == [True, True]
    assert [set(drawn_ids(method, step)) <= clean for step in (7, 9)] == [True, True]


@pytest.mark.parametrize("name", ["image_reweight", "pixel_reweight"])
def test_a_reweighted_method_may_be_framed_by_two_uniform_phases(build, name: str) -> None:
    """10 steps: warm-up 0 and 1, reweighted 2 to 6, clean 7 to 9."""
    method, noisy, clean = build(name, warm_up=0.2, clean_phase=0.3, include_clean=True)
    for step, streams, weighs in [(0, noisy, False), (1, noisy, False), (2, noisy | clean, True),
                                  (6, noisy | clean, True), (7, clean, False), (9, clean, False)]:  # fmt: skip
        batches, diagnostics = method.draw(step, diagnose=True)
        ids = {i for b in batches for i in b.batch.ids}
        assert ids <= streams and all(ids & part for part in (noisy, clean) if part <= streams), step
        assert ("auroc" in diagnostics) == weighs, step
        maps = torch.cat([full(b) for b in batches])
        assert maps.sum().item() == pytest.approx(1, abs=1e-5), step
        assert (maps.unique().numel() == 1) != weighs, step


def test_phases_have_the_length_that_suits_the_method() -> None:
    lengths = {name: (MethodConfig(name=name).warm_up, MethodConfig(name=name).clean_phase) for name in METHODS}
    assert {name: pair for name, pair in lengths.items() if any(pair)} == {
        "finetune": (0, 0.3), "label_correction": (0.3, 0.2)
    }  # fmt: skip
    assert MethodConfig(name="label_correction", warm_up=0).warm_up == 0


def test_label_correction_learns_from_what_it_has_corrected_and_from_the_clean_labels_as_they_are(build) -> None:
    """To a network that is sure of lesion everywhere drawn background means nothing: all of it becomes lesion."""
    method, noisy, clean = build("label_correction", warm_up=0.2, clean_phase=0.1, clean_share=0.4)
    for step in range(STEPS):
        batches, diagnostics = method.draw(step, diagnose=True)
        ids = {i for b in batches for i in b.batch.ids}
        assert (bool(ids & noisy), bool(ids & clean)) == (step < 9, step >= 2)
        assert sum(full(b).sum().item() for b in batches) == pytest.approx(1, abs=1e-5)
        drawn_wrong = left_wrong = count = 0
        for weighted in batches:
            masks, truth = weighted.batch.masks, weighted.batch.true_masks
            logits = torch.full((len(masks), 1, 16, 16), 3.0)
            labels = masks.clone()
            if 2 <= step < 9:
                assert full(weighted)[4:].sum() / full(weighted).sum() == pytest.approx(0.4, abs=1e-5)
                labels[:4] = 1
            expected = weighted_loss(logits, labels, *weighted.weights)
            torch.testing.assert_close(method.loss(logits, masks, weighted.weights), expected)
            if step < 9:
                drawn_wrong += (masks != truth)[:4].sum().item()
                left_wrong += (labels != truth)[:4].sum().item()
                count += masks[:4].numel()
        method.finish_step(0.1)
        if step < 9:
            assert diagnostics["noise_rate"].item() == pytest.approx(drawn_wrong / count)
            assert diagnostics["corrected_noise_rate"].item() == pytest.approx(left_wrong / count)
        else:
            assert diagnostics == {}


def test_phases_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="more than all steps"):
        MethodConfig(warm_up=0.6, clean_phase=0.5)


def test_image_reweight_gives_an_image_one_weight(build) -> None:
    method, *_ = build("image_reweight")
    for weighted in method.draw(0, diagnose=False)[0]:
        assert all(w.unique().numel() == 1 for w in full(weighted))


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_include_clean_takes_its_share_of_the_weight(build, share: float) -> None:
    method, noisy, clean = build("pixel_reweight", include_clean=True, clean_share=share)
    batches, diagnostics = method.draw(0, diagnose=True)
    for weighted in batches:
        assert full(weighted).shape == (4 + 3, 16, 16)
        assert set(weighted.batch.ids[:4]) <= noisy and set(weighted.batch.ids[4:]) <= clean
        assert full(weighted)[4:].unique().numel() == 1
    assert sum(full(b)[:4].sum().item() for b in batches) == pytest.approx(1 - share, abs=1e-5)
    assert sum(full(b)[4:].sum().item() for b in batches) == pytest.approx(share, abs=1e-5)
    assert {"gradient_norm", "wrong_mass", "auroc"} <= diagnostics.keys()


def test_the_registry_holds_the_methods_that_a_config_may_name() -> None:
    assert set(METHODS) == set(get_args(MethodConfig.model_fields["name"].annotation))


@pytest.mark.parametrize("name", METHODS)
def test_needs_clean_and_needs_noisy_are_what_the_streams_say(build, name: str) -> None:
    build(name)
    config = MethodConfig(name=name)
    assert config.needs_clean == ("clean" in build.opened)
    assert config.needs_noisy == ("noisy" in build.opened)


def test_meta_weight_net_weighs_by_the_loss_and_sums_to_the_mean_weight(build) -> None:
    method, noisy, _ = build("meta_weight_net")
    before = method.state_dict()
    batches, diagnostics = method.draw(0, diagnose=True)
    total = sum(full(b).sum().item() for b in batches)
    assert 0 < total < 1 and diagnostics["mean_weight"].item() == pytest.approx(total, abs=1e-6)
    assert {"wrong_mass", "auroc", "noise_rate"} <= diagnostics.keys()
    assert set(batches[0].batch.ids) <= noisy
    assert any(not torch.equal(before[k], v) for k, v in method.state_dict().items() if k in before)


@pytest.mark.parametrize(
    ("name", "options", "learned"),
    [
        ("meta_weight_net", {}, "0.parameter"),
        ("t_loss", {}, "0.parameter"),
        ("label_correction", {"warm_up": 0.1}, "counts"),
    ],
)
def test_a_method_that_learns_goes_on_from_its_state(
    build, tmp_path: Path, name: str, options: dict, learned: str
) -> None:
    def steps(method: Method, numbers: range) -> None:
        for step in numbers:
            for weighted in method.draw(step, diagnose=False)[0]:
                logits = weighted.batch.images.mean(1, keepdim=True) * (1 + step)
                method.loss(logits, weighted.batch.masks, weighted.weights)
            method.finish_step(0.1)

    whole, first, second = (build(name, **options)[0] for _ in range(3))
    initial = whole.state_dict().get(learned)
    steps(whole, range(4))
    steps(first, range(2))
    save_file(first.state_dict(), tmp_path / "method.safetensors")
    second.load_state_dict(load_file(tmp_path / "method.safetensors"))
    steps(second, range(2, 4))
    expected, actual = whole.state_dict(), second.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    assert initial is None or not torch.equal(expected[learned], initial)


def test_t_loss_learns_nu_towards_the_likelihood(build) -> None:
    """At the maximum of the likelihood of images that fit as badly as the first batch, ν stands still."""
    method, *_ = build("t_loss")
    [weighted, _] = method.draw(0, diagnose=False)[0]
    values = []
    for _ in range(30):
        values.append(method.loss(torch.zeros(4, 1, 16, 16), weighted.batch.masks, weighted.weights).item())
        method.finish_step(0.1)
    assert values[-1] < values[0]
    assert method.draw(1, diagnose=True)[1]["nu"].item() != pytest.approx(1.0, abs=0.1)


def test_a_gradient_that_is_not_finite_does_not_end_what_is_learned() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    learned = Learned([parameter], lr=0.1)
    learned.step([torch.tensor([1.0, float("nan")])])
    assert torch.equal(parameter.detach(), torch.zeros(2))
    learned.step([torch.ones(2)])
    assert (parameter < 0).all()
