"""What every kind of noise is: a section of the config that can draw a wrong mask."""

from abc import abstractmethod
from typing import Annotated, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from distseg.data.seeding import generator
from distseg.section import Section

Mask = NDArray[np.uint8]
"""(H, W) uint8 in {0, 1}: where one class is."""
Image = NDArray[np.uint8]
"""(H, W, 3) uint8 RGB."""


class NoiseKind(Section):
    """A kind adds `kind`, a Literal with its name as default, and its parameters; their order is that of its level."""

    kind: str
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    """Of the noisy masks; each is a function of it, the image's id and its mask."""

    @abstractmethod
    def draw_for(self, sample_id: str, mask: Mask, image: Image | None, label: int = 1) -> Mask:
        """A wrong mask for `mask`, which is not written to, of one class id of a sample.

        `image` is given where the kind looks at it.
        """

    def with_seed(self, seed: int) -> Self:
        return self.model_copy(update={"seed": seed})

    @classmethod
    def parameter_names(cls) -> list[str]:
        return [name for name in cls.model_fields if name not in NoiseKind.model_fields]

    @property
    def parameters(self) -> str:
        """The parameters in one line, `alpha=0.7 beta=0.5`."""
        return " ".join(f"{name}={getattr(self, name)}" for name in self.parameter_names())

    @property
    def level(self) -> str:
        """The noise level as papers write it, `boundary(0.7, 0.5)`."""
        values = [f"{getattr(self, name):g}" for name in self.parameter_names()]
        return f"{self.kind}({', '.join(values)})" if values else self.kind

    @property
    def looks_at_image(self) -> bool:
        """Whether the noisy mask depends on the image, and not on the true mask alone."""
        return False


class AnnotatorKind(NoiseKind):
    """The kind of one annotator, who draws."""

    needs_image: ClassVar[bool] = False
    """Whether `draw` looks at the image."""

    @abstractmethod
    def draw(self, mask: Mask, image: Image | None, rng: np.random.Generator) -> Mask:
        """A wrong mask for `mask`, which is not written to; `image` is given where the kind looks at it."""

    def draw_for(self, sample_id: str, mask: Mask, image: Image | None, label: int = 1) -> Mask:
        """`draw` with the random numbers of one sample, of one class id of it."""
        place = (sample_id,) if label == 1 else (sample_id, label)
        return self.draw(mask, image, generator(self.seed, "noise", *place))

    @property
    def looks_at_image(self) -> bool:
        return self.needs_image
