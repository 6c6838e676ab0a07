"""The experiment's configuration: the sections of every room, joined."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from distseg.data.config import DataConfig
from distseg.distributed.config import DeepSpeedConfig
from distseg.methods.config import MethodConfig
from distseg.methods.losses.cross_entropy import CrossEntropyConfig
from distseg.methods.losses.dice_cross_entropy import DiceCrossEntropyConfig
from distseg.models.config import ModelConfig, UNetConfig
from distseg.optim.config import OptimConfig
from distseg.section import Section
from distseg.tracking.config import TrackingConfig
from distseg.training.config import TrainConfig


class Config(Section):
    """One experiment. `configs/*.yaml` are of this type; docs/keys.md has every key."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The folder of the run in runs/, and its name in MLflow."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the clean set, the order of the images, augmentation and the initial network."""
    data: DataConfig
    model: ModelConfig = UNetConfig()
    method: MethodConfig = MethodConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        stride = 2**self.model.depth if isinstance(self.model, UNetConfig) else 1
        if self.data.image_size % stride:
            raise ValueError(
                f"data.image_size {self.data.image_size} must be a multiple of {stride} (2**model.depth) for unet"
            )
        if self.data.clean_count is None and self.data.noise.kind != "none":
            raise ValueError(
                f"data.noise.kind {self.data.noise.kind}: draws wrong masks from right ones, as studies do; set "
                "data.clean_count=K, or data.noise.kind=none to learn from the annotations that there are"
            )
        if self.data.clean_count == 0 and self.method.needs_clean:
            raise ValueError(f"data.clean_count 0: {self.method.name} learns from clean images; set it to 1 or more")
        if self.data.annotators == "all" and self.method.labels.kind != "corrected":
            raise ValueError(
                f"data.annotators all: is for labels of kind corrected, not {self.method.labels.kind}; set it to "
                "drawn, majority or staple"
            )
        if self.data.annotators != "all" and getattr(self.method.labels, "pooled", False):
            raise ValueError("method.labels.pooled: applies to data.annotators=all alone; set that, or leave it out")
        if self.method.weighting.kind == "learned" and self.deepspeed.zero_stage == 3:
            raise ValueError("deepspeed.zero_stage 3: learned weights need whole parameters; set it to 2 or less")
        if self.deepspeed.zero_stage == 3 and getattr(self.method.weighting, "meta_precision", "fp32") == "bf16":
            raise ValueError(
                "deepspeed.zero_stage 3: a meta pass in bf16 needs whole parameters; set it to 2 or less, or "
                "method.weighting.meta_precision=fp32"
            )
        if self.method.phases.kind == "union" and self.train.batch_size % 2:
            raise ValueError(f"train.batch_size {self.train.batch_size} must be even for union, half and half")
        return self

    @model_validator(mode="after")
    def _every_class_has_its_weight(self) -> Self:
        loss = self.method.loss
        weights = loss.class_weights if isinstance(loss, CrossEntropyConfig | DiceCrossEntropyConfig) else None
        names = self.data.class_names
        if weights is not None and len(weights) != len(names):
            raise ValueError(
                f"method.loss.class_weights has {len(weights)} numbers for {len(names)} classes; give one for each of "
                + ", ".join(names)
            )
        return self
