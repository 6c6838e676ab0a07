"""The `method` section of a config."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from distseg.section import Fraction, Section

_PHASES: dict[str, dict[str, float]] = {
    "finetune": {"clean_phase": 0.3},
    "label_correction": {"warm_up": 0.3, "clean_phase": 0.2},
}


class MethodConfig(Section):
    name: Literal[
        "noisy_only",
        "clean_only",
        "union",
        "finetune",
        "image_reweight",
        "pixel_reweight",
        "label_correction",
        "meta_weight_net",
        "generalised_cross_entropy",
        "t_loss",
        "oracle",
    ] = "pixel_reweight"
    """What each does: distseg/methods/registry.py."""
    estimator: Literal["forward", "reverse", "finite"] = "forward"
    granularity: Annotated[str, Field(pattern=r"^(pixel|image|patch\([1-9][0-9]*\))$")] = "pixel"
    """pixel | patch(k) | image. `image_reweight` always uses image."""
    transform: Literal["clamp", "root", "sign"] = "clamp"
    """pixel_reweight: what counts where the alignment U is above 0: U itself, as in the paper, its root, or 1."""
    normalise: Literal["batch", "image"] = "batch"
    warm_up: Fraction = 0.0
    """image_reweight, pixel_reweight, label_correction: the first part of the steps, spent on the noisy images as they
    are, with equal weights; 0.3 of label_correction and 0 of the others, unless set."""
    clean_phase: Fraction = 0.0
    """These three and finetune: the last part of the steps, spent on the clean images alone; 0.3 of finetune, 0.2 of
    label_correction and 0 of the others, unless set."""
    include_clean: bool = False
    """image_reweight, pixel_reweight: between warm-up and clean phase, also learn from the clean batch."""
    clean_share: Fraction = 0.5
    """include_clean, and label_correction: how much of the loss is the mean clean one; the rest is the noisy one."""
    on_zero: Literal["skip", "uniform"] = "skip"
    virtual_lr: Annotated[float, Field(gt=0)] = 0.1
    """α, the size of the virtual SGD step that weights are derived through; it does not matter where the step starts at
    weights of 0, as the paper's does."""
    initial_weight: Annotated[float, Field(ge=0)] = 0.0
    """image_reweight and pixel_reweight: the sum of the weights that the virtual step starts with, the same on every
    valid pixel of the global batch."""
    q: Annotated[float, Field(gt=0, le=1)] = 0.7
    """generalised_cross_entropy: between cross-entropy (towards 0) and the mean absolute error (1)."""
    weight_lr: Annotated[float, Field(gt=0)] = 1e-3
    """meta_weight_net: the rate of the net that maps losses to weights."""

    @model_validator(mode="before")
    @classmethod
    def _phases_of_the_method(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        phases = {"warm_up": 0.0, "clean_phase": 0.0} | _PHASES.get(values.get("name", ""), {})
        return values | {name: default for name, default in phases.items() if values.get(name) is None}

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if self.warm_up + self.clean_phase > 1:
            raise ValueError(f"warm_up {self.warm_up} and clean_phase {self.clean_phase} are more than all steps")
        return self

    @property
    def needs_clean(self) -> bool:
        return self.name not in ("noisy_only", "generalised_cross_entropy", "t_loss", "oracle")

    @property
    def needs_noisy(self) -> bool:
        return self.name not in ("clean_only", "oracle")
