"""The method section: presets, parts, and keys that do not apply."""

from collections import Counter

import pytest
from pydantic import ValidationError

from distseg.methods.config import MethodConfig
from distseg.methods.presets import PRESETS
from distseg.section import kinds_of

PARTS = ("phases", "weighting", "loss", "labels")


def method(**values) -> MethodConfig:
    return MethodConfig.model_validate(values)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_a_round_trip(name: str) -> None:
    config = method(name=name)
    assert MethodConfig.model_validate(config.model_dump()) == config


def test_presets_are_combinations_of_parts() -> None:
    table = {name: tuple(getattr(method(name=name), part).kind for part in PARTS) for name in PRESETS}
    assert table == {
        "noisy_only": ("noisy", "uniform", "cross_entropy", "drawn"),
        "clean_only": ("clean", "uniform", "cross_entropy", "drawn"),
        "union": ("union", "uniform", "cross_entropy", "drawn"),
        "finetune": ("noisy", "uniform", "cross_entropy", "drawn"),
        "image_reweight": ("noisy", "aligned", "cross_entropy", "drawn"),
        "pixel_reweight": ("noisy", "aligned", "cross_entropy", "drawn"),
        "label_correction": ("noisy", "uniform", "cross_entropy", "corrected"),
        "meta_weight_net": ("noisy", "learned", "cross_entropy", "drawn"),
        "dice_cross_entropy": ("noisy", "uniform", "dice_cross_entropy", "drawn"),
        "generalised_cross_entropy": ("noisy", "uniform", "generalised_cross_entropy", "drawn"),
        "t_loss": ("noisy", "uniform", "t_loss", "drawn"),
        "oracle": ("truth", "uniform", "cross_entropy", "drawn"),
    }
    assert method().name == "pixel_reweight"
    assert (method(name="finetune").phases.clean_phase, method(name="label_correction").phases.warm_up) == (0.3, 0.3)
    assert method(name="image_reweight").weighting.granularity == "image"


def test_any_combination_can_be_written() -> None:
    config = method(name="finetune", loss={"kind": "generalised_cross_entropy", "q": 0.5})
    assert (config.phases.clean_phase, config.loss.q) == (0.3, 0.5)
    config = method(name="pixel_reweight", loss="dice_cross_entropy", dice=0.7, class_weights=[1, 20])
    assert (config.loss.kind, config.loss.dice, config.loss.class_weights) == ("dice_cross_entropy", 0.7, (1.0, 20.0))
    assert method(name="finetune", class_weights=[1, 20]).loss.kind == "cross_entropy"
    config = method(name="pixel_reweight", labels="corrected", include_clean=True, held_out=0.5)
    assert (config.weighting.kind, config.labels.kind, config.phases.clean_share) == ("aligned", "corrected", 0.5)
    config = method(name="label_correction", weighting={"kind": "aligned", "estimator": "reverse"}, warm_up=0.1)
    assert (config.weighting.estimator, config.phases.warm_up, config.phases.held_out) == ("reverse", 0.1, 0.3)


def test_a_key_needs_no_part_before_it() -> None:
    """And means one key: no two parts have keys of the same name."""
    assert method(name="finetune", clean_phase=0.5) == method(name="finetune", phases={"clean_phase": 0.5})
    assert method(estimator="finite") == method(weighting={"kind": "aligned", "estimator": "finite"})
    parts = {
        part: {
            key
            for member in kinds_of(MethodConfig.model_fields[part].annotation).values()
            for key in member.model_fields
            if key != "kind"
        }
        for part in PARTS
    }
    assert max(Counter(key for keys in parts.values() for key in keys).values()) == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "noisy_only", "estimator": "reverse"}, "estimator is no key of uniform; remove it"),
        ({"name": "noisy_only", "estimator": "reverse"}, ".estimator=null takes it back), or set .kind=aligned"),
        ({"estimator": "head", "initial_weight": 1.0}, "initial_weight does nothing with estimator head"),
        ({"estimator": "finite", "meta_precision": "bf16"}, "set .meta_precision=fp32, or .estimator=forward"),
        ({"name": "finetune", "q": 0.5}, "or set .kind=generalised_cross_entropy"),
        ({"name": "finetune", "dice": 0.5}, "dice is no key of cross_entropy"),
        ({"name": "finetune", "class_weights": [1, 0]}, "greater than 0"),
        ({"name": "t_loss", "class_weights": [1, 2]}, "class_weights is no key of t_loss"),
        ({"name": "clean_only", "clean_phase": 0.5}, "clean_phase is no key of clean"),
        ({"name": "t_loss", "weighting": "aligned"}, "t_loss: takes one weight an image"),
        ({"name": "clean_only", "labels": "corrected"}, "there are no noisy images to correct"),
        ({"name": "union", "labels": "corrected"}, "are calibrated on clean images before these are learned from"),
        ({"name": "label_correction", "held_out": 0}, ".phases.held_out above 0"),
        ({"name": "finetune", "held_out": 0.2}, "held_out applies where .include_clean=true"),
        (
            {"name": "label_correction", "held_out": 0.5, "clean_phase": 0.3},
            "held_out 0.5 and clean_phase 0.3 are more",
        ),
        ({"name": "union", "weighting": "aligned"}, "set .phases.kind=noisy or .weighting.kind=uniform"),
        ({"name": "noisy_only", "warm_up": 0.2}, "nothing would change after it"),
        ({"name": "noisy_only", "clean_share": 0.2}, "clean_share applies where .include_clean=true"),
        ({"warm_up": 0.6, "clean_phase": 0.5}, "more than all steps"),
        ({"weighting": {"kind": "aligned", "q": 0.5}}, "Extra inputs are not permitted"),
        ({"weighting": "nothing"}, "does not match any of the expected tags"),
        ({"name": "pixels"}, "Input should be 'noisy_only'"),
        ({"name": ["a"]}, "Input should be 'noisy_only'"),
        ({"weighting": [1], "estimator": "finite"}, "weighting"),
        ({"weighting": 3}, "weighting"),
        ({"kind": "aligned"}, "Extra inputs are not permitted"),
        ({"q": 0.5, "loss": {"kind": "generalised_cross_entropy", "q": 0.7}}, "q is written twice, as loss.q too"),
    ],
)
def test_what_does_not_apply_is_an_error(values: dict, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        MethodConfig.model_validate(values)
    assert said in str(caught.value)


def test_null_takes_a_key_back() -> None:
    assert method(name="noisy_only", estimator=None, clean_share=None) == method(name="noisy_only")
    assert method(name="label_correction", warm_up=None).phases.warm_up == 0.3
    assert method(name="label_correction", warm_up=0).phases.warm_up == 0
