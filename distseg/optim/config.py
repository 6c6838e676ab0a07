"""The `optim` section of a config."""

from typing import Annotated, Literal

from pydantic import Field

from distseg.section import Fraction, Section


class OptimConfig(Section):
    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 1e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """sgd only; adam and adamw use betas (0.9, 0.999)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "step", "cosine", "one_cycle"] = "constant"
    milestones: tuple[Fraction, ...] = (1 / 3, 2 / 3)
    """step: where the rate is multiplied by gamma, as fractions of the steps."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    implementation: Literal["auto", "apex", "torch"] = "auto"
