"""The `method` section of a config: a preset's name, and the four parts that it is made of.

    method: {name: finetune, loss: {kind: generalised_cross_entropy, q: 0.5}}

A part's key may be written without the part, `method.q=0.5` for `method.loss.q=0.5`. A key that no part of the method
has is an error.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from distseg.methods.labels.corrected import CorrectedConfig
from distseg.methods.labels.drawn import DrawnConfig
from distseg.methods.losses.cross_entropy import CrossEntropyConfig
from distseg.methods.losses.dice_cross_entropy import DiceCrossEntropyConfig
from distseg.methods.losses.generalised_cross_entropy import GeneralisedCrossEntropyConfig
from distseg.methods.losses.t_loss import TLossConfig
from distseg.methods.phases import NoisyConfig, PhasesConfig
from distseg.methods.presets import PRESETS
from distseg.methods.weighting.aligned import AlignedConfig
from distseg.methods.weighting.learned import LearnedConfig
from distseg.methods.weighting.uniform import UniformConfig
from distseg.section import Section, kinds_of, of_kind

# The registry of the parts: a new one is added to its line.
Weightings = UniformConfig | AlignedConfig | LearnedConfig
Losses = CrossEntropyConfig | DiceCrossEntropyConfig | GeneralisedCrossEntropyConfig | TLossConfig
LabelModels = DrawnConfig | CorrectedConfig

WeightingConfig = Annotated[Weightings, Field(discriminator="kind"), of_kind(Weightings)]
LossConfig = Annotated[Losses, Field(discriminator="kind"), of_kind(Losses)]
LabelsConfig = Annotated[LabelModels, Field(discriminator="kind"), of_kind(LabelModels)]


class MethodConfig(Section):
    name: Literal[tuple(PRESETS)] = "pixel_reweight"  # type: ignore[valid-type]
    """The preset that the parts start from (distseg/methods/presets.py)."""
    phases: PhasesConfig = NoisyConfig()
    """Which images a step takes, and when."""
    weighting: WeightingConfig = UniformConfig()
    """How much each noisy pixel counts."""
    loss: LossConfig = CrossEntropyConfig()
    """What a labelled pixel costs."""
    labels: LabelsConfig = DrawnConfig()
    """Which label a noisy pixel is given."""

    @model_validator(mode="before")
    @classmethod
    def _parts_of_the_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = with_parts(values)
        name = values.get("name", cls.model_fields["name"].default)
        preset = PRESETS.get(name, {}) if isinstance(name, str) else {}
        return values | {part: _over(part, preset.get(part, {}), values.get(part)) for part in PARTS}

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        phases, weighting = self.phases, self.weighting
        if phases.kind != "noisy" and weighting.kind != "uniform":
            raise ValueError(
                f"phases {phases.kind}: weights of kind {weighting.kind} are of noisy images that come by themselves; "
                "set .phases.kind=noisy or .weighting.kind=uniform"
            )
        if not phases.takes_noisy and self.labels.kind != "drawn":
            raise ValueError(f"phases {phases.kind}: there are no noisy images to correct; set .labels.kind=drawn")
        if self.labels.kind == "corrected" and not phases.holds_out_clean:
            raise ValueError(
                "labels corrected: are calibrated on clean images before these are learned from; set "
                ".phases.kind=noisy and .phases.held_out above 0, or .labels.kind=drawn"
            )
        main_phase_differs = weighting.kind != "uniform" or self.labels.kind != "drawn"
        if phases.kind == "noisy" and phases.warm_up and not (main_phase_differs or phases.include_clean):
            raise ValueError(
                f"warm_up {phases.warm_up}: nothing would change after it; set .phases.warm_up=0, or weights, labels "
                "or clean images for the steps after it"
            )
        if self.loss.kind == "t_loss" and weighting.by_pixel:
            raise ValueError(
                "loss t_loss: takes one weight an image; set .weighting.kind=uniform or .weighting.granularity=image"
            )
        return self

    @property
    def needs_clean(self) -> bool:
        return self.phases.takes_clean or self.weighting.needs_clean or self.labels.needs_held_out

    @property
    def needs_noisy(self) -> bool:
        return self.phases.takes_noisy


PARTS = ("phases", "weighting", "loss", "labels")


def part_with(key: str) -> str | None:
    """The part that has a key of this name, whatever its kind; no two have. `kind` itself is of none."""
    for part in PARTS:
        members = kinds_of(MethodConfig.model_fields[part].annotation).values()
        if key != "kind" and any(key in member.model_fields for member in members):
            return part
    return None


def with_parts(values: dict[str, Any]) -> dict[str, Any]:
    """A method section as written, each key of a part in its part. Raises ValueError where one is written twice."""
    homes = {key: part for key in values if (part := part_with(str(key))) is not None}
    spelled = {key: value for key, value in values.items() if key not in homes}
    for key, part in homes.items():
        given = spelled.get(part)
        given = {"kind": given} if isinstance(given, str) else given or {}
        if not isinstance(given, dict):
            continue  # pydantic says what is wrong with the part
        if key in given:
            raise ValueError(f"{key} is written twice, as {part}.{key} too; remove one of the two")
        spelled[part] = {**given, key: values[key]}
    return spelled


def _over(part: str, preset: dict[str, Any], given: Any) -> Any:
    """A part as given, over the preset's where both are of one kind; a word alone is a kind."""
    preset = {"kind": MethodConfig.model_fields[part].default.kind} | preset
    if given is None:
        return preset
    if isinstance(given, str):
        given = {"kind": given}
    if not isinstance(given, dict) or (given.get("kind") or preset["kind"]) != preset["kind"]:
        return given
    return preset | {key: value for key, value in given.items() if value is not None}
