"""The kinds of noise that draw. A new kind is its file, its import and its line in `Kinds`."""

from typing import Annotated

from pydantic import Field

from distseg.data.noise.boundary import BoundaryNoise
from distseg.data.noise.box import BoxNoise
from distseg.data.noise.markov import MarkovNoise
from distseg.data.noise.polygon import PolygonNoise
from distseg.data.noise.unsupervised import UnsupervisedNoise
from distseg.section import of_kind

Kinds = (
    PolygonNoise
    | BoxNoise
    | BoundaryNoise
    | MarkovNoise
    | UnsupervisedNoise
)  # fmt: skip
"""One line a kind."""

Annotator = Annotated[Kinds, Field(discriminator="kind"), of_kind(Kinds)]
"""One of `Kinds`, chosen by its key `kind`."""
