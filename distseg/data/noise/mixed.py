"""Masks by annotators of several kinds."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from distseg.data.noise.kind import Image, Mask, NoiseKind
from distseg.data.noise.registry import Annotator
from distseg.data.seeding import generator, stable_hash


class MixedNoise(NoiseKind):
    kind: Literal["mixed"] = "mixed"
    annotators: Annotated[tuple[Annotator, ...], Field(max_length=1000)] = ()
    """Whose masks are mixed, in equal shares; each is a mapping with its kind and its parameters, without a seed."""

    @model_validator(mode="after")
    def _annotators_can_be_told_apart(self) -> Self:
        if len(self.annotators) < 2:
            raise ValueError("annotators: mixed noise needs two or more, for instance [{kind: polygon}, {kind: box}]")
        if any(annotator.seed for annotator in self.annotators):
            raise ValueError("annotators: none has a seed of its own; set data.noise.seed")
        return self

    def draw_for(self, sample_id: str, mask: Mask, image: Image | None, label: int = 1) -> Mask:
        """The same annotators, in the same order, draw the same sample again; each has random numbers of its own."""
        chosen = int(generator(self.seed, "annotator", sample_id).integers(len(self.annotators)))
        seed = stable_hash(self.seed, "annotator", chosen) % 2**63
        return self.annotators[chosen].with_seed(seed).draw_for(sample_id, mask, image, label)

    @property
    def parameters(self) -> str:
        """The annotators' levels in one line."""
        return " ".join(annotator.level for annotator in self.annotators)

    @property
    def level(self) -> str:
        return f"mixed({', '.join(annotator.level for annotator in self.annotators)})"

    @property
    def looks_at_image(self) -> bool:
        return any(annotator.looks_at_image for annotator in self.annotators)
