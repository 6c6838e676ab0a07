"""The `model` section of a config."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from distseg.section import Count, Section


class ModelConfig(Section):
    name: str = "unet"
    """`unet`, or an importable `package.module:callable` that returns an nn.Module."""
    width: Count = 64
    depth: Annotated[int, Field(ge=1, le=8)] = 4
    """Number of downsamplings; the paper's network has width 64 and depth 4."""
    norm: Literal["none", "batch", "group"] = "none"
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of an imported model; must be empty for `unet`."""

    @model_validator(mode="after")
    def _options_are_for_imports(self) -> Self:
        if self.name == "unet" and self.options:
            raise ValueError("options are for imported models; unet takes width, depth and norm")
        if self.name != "unet" and ":" not in self.name:
            raise ValueError(f"name {self.name!r} is neither `unet` nor `package.module:callable`")
        return self
