"""The section `data.noise`: one of the kinds, chosen by its key `kind`; `none` where nothing is said."""

from typing import Annotated

from pydantic import Field

from distseg.data.noise.mixed import MixedNoise
from distseg.data.noise.none import NoNoise
from distseg.data.noise.registry import Kinds
from distseg.section import of_kind

NoiseConfig = Annotated[
    NoNoise | Kinds | MixedNoise,
    Field(discriminator="kind"),
    of_kind(NoNoise | Kinds | MixedNoise, default="none"),
]
