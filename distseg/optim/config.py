"""The `optim` section of a config."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from distseg.section import Fraction, Section


class OptimConfig(Section):
    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """The optimiser."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """The learning rate, the largest of its schedule."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """sgd only; adam and adamw use betas (0.9, 0.999)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decay of every parameter, L2 of sgd and adam."""
    schedule: Literal["constant", "step", "cosine", "one_cycle"] = "constant"
    """The rate over the steps: constant; times gamma at milestones; cosine to 0; one_cycle, up for 30 % and down."""
    milestones: tuple[Fraction, ...] = (1 / 3, 2 / 3)
    """step: where the rate is multiplied by gamma, as fractions of the steps."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """step: the factor at each milestone."""
    implementation: Literal["auto", "apex", "torch"] = "auto"
    """auto: apex's fused optimisers where they can be built, torch's fused ones elsewhere."""

    @model_validator(mode="after")
    def _keys_apply(self) -> Self:
        for key, applies, mend in (
            ("momentum", self.name == "sgd", ".name=sgd"),
            ("milestones", self.schedule == "step", ".schedule=step"),
            ("gamma", self.schedule == "step", ".schedule=step"),
        ):
            if not applies and getattr(self, key) != type(self).model_fields[key].default:
                chosen = f"name {self.name}" if key == "momentum" else f"schedule {self.schedule}"
                raise ValueError(f"{key} does nothing with {chosen}; leave it out, or set {mend}")
        return self
