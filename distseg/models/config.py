"""The `model` section of a config."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from distseg.section import Count, Section

IMPORTABLE = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"


class UNetConfig(Section):
    name: Literal["unet"] = "unet"
    """The paper's U-Net, with padded convolutions."""
    width: Count = 64
    """Channels at full resolution; they double at each downsampling."""
    depth: Annotated[int, Field(ge=1, le=8)] = 4
    """Number of downsamplings; the paper's network has width 64 and depth 4."""
    norm: Literal["none", "batch", "group"] = "none"
    """Normalisation after each convolution; none is the paper's."""
    init_from: Path | None = None
    """A run, or a safetensors file, whose tensors the network begins with where names and shapes fit, in place of drawn
    ones. Read at the run's first start alone; init.json in its folder says what was taken."""


class ImportedConfig(Section):
    name: Annotated[str, Field(pattern=f"^{IMPORTABLE}$")]
    """`package.module:callable`: an nn.Module class, or a function that is declared to return one (models/registry.py).
    The working folder is searched last."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the callable."""
    init_from: Path | None = None
    """A run, or a safetensors file, whose tensors the network begins with where names and shapes fit, in place of drawn
    ones. Read at the run's first start alone; init.json in its folder says what was taken."""


def _kind_of(values: Any) -> str:
    name = values.get("name", "unet") if isinstance(values, dict) else getattr(values, "name", "unet")
    return "unet" if name == "unet" else "package.module:callable"


def _keys_of_the_kind(values: Any) -> Any:
    """Without keys that are null, which takes them back; ValueError for a key of the other kind."""
    if isinstance(values, Section):
        return values
    if not isinstance(values, dict):
        raise ValueError("must be a mapping, for instance {name: unet, width: 12}")
    values = {key: value for key, value in values.items() if value is not None}
    name = values.get("name", "unet")
    if name == "unet":
        if values.pop("options", None):
            raise ValueError("options are for imported models; unet takes width, depth and norm")
        return values
    if not isinstance(name, str) or not re.fullmatch(IMPORTABLE, name):
        raise ValueError(f"name {name!r} is neither `unet` nor `package.module:callable`")
    if foreign := sorted(str(key) for key in values.keys() - ImportedConfig.model_fields.keys()):
        taken_back = " ".join(f"model.{key}=null" for key in foreign)
        raise ValueError(
            f"{', '.join(foreign)}: no key of an imported network, as name={name} is; leave it out ({taken_back} takes "
            "it back), and write the network's own arguments as model.options.NAME=VALUE"
        )
    return values


ModelConfig = Annotated[
    Annotated[UNetConfig, Tag("unet")] | Annotated[ImportedConfig, Tag("package.module:callable")],
    Discriminator(_kind_of),
    BeforeValidator(_keys_of_the_kind),
]
