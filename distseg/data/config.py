"""The `data` section of a config."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from distseg.section import Count, Fraction, Range, Section

_NOISE_PARAMETERS: dict[str, dict[str, Any]] = {
    "none": {},
    "polygon": {"vertices": 3},
    "box": {},
    "boundary": {"alpha": 0.7, "beta": 0.7},
    "markov": {"steps": 100, "theta1": 0.2, "theta2": 0.05, "theta3": 0.0},
    "unsupervised": {},
    "mixed": {"annotators": ()},
}


class NoiseConfig(Section):
    """How the noisy stream's masks are made wrong (distseg/data/noise.py).

    A parameter that the kind does not use is an error: `null` takes it back where another kind has set it.
    """

    kind: Literal["none", "polygon", "box", "boundary", "markov", "unsupervised", "mixed"] = "none"
    """`none` takes the manifest's noisy_mask where there is one, and the true mask elsewhere."""
    vertices: Annotated[int, Field(ge=3)] | None = None
    """polygon: vertices on the true contour; 3 (default) and 7 are the paper's levels."""
    alpha: Fraction | None = None
    """boundary: the fraction of masks that are drawn wrong; 0.7."""
    beta: Annotated[float, Field(gt=0, le=1)] | None = None
    """boundary: wrong pixels as a fraction of the lesion's area; 0.7."""
    steps: Count | None = None
    """markov: steps of the walk, T; 100."""
    theta1: Fraction | None = None
    """markov: how often a step grows the lesion; 0.2, a lesion drawn too small."""
    theta2: Fraction | None = None
    """markov: how many of the contour's pixels a step moves; 0.05."""
    theta3: Fraction | None = None
    """markov: how many pixels of the frame are flipped at the end; 0."""
    annotators: tuple["NoiseConfig", ...] | None = None
    """mixed: whose masks are mixed, in equal shares; each is a mapping like this one, without a seed."""
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_kind(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return values | {
            name: default
            for name, default in _NOISE_PARAMETERS.get(values.get("kind", "none"), {}).items()
            if values.get(name) is None
        }

    @model_validator(mode="after")
    def _parameters_are_of_the_kind(self) -> Self:
        used = _NOISE_PARAMETERS[self.kind]
        every = {name for parameters in _NOISE_PARAMETERS.values() for name in parameters}
        unused = sorted(name for name in every - used.keys() if getattr(self, name) is not None)
        if unused:
            raise ValueError(f"{unused[0]} is no parameter of {self.kind} noise; set {unused[0]}=null")
        if self.kind == "mixed" and len(self.annotators) < 2:
            raise ValueError("annotators: mixed noise needs two or more, for instance [{kind: polygon}, {kind: box}]")
        for annotator in self.annotators or ():
            if annotator.kind in ("none", "mixed") or annotator.seed:
                raise ValueError("annotators: each is of a kind other than none and mixed, and has no seed of its own")
        return self

    @property
    def parameters(self) -> str:
        """The parameters of the kind in one line, `alpha=0.7 beta=0.5`; those of annotators as their levels."""
        if self.kind == "mixed":
            return " ".join(annotator.level for annotator in self.annotators)
        return " ".join(f"{name}={getattr(self, name)}" for name in _NOISE_PARAMETERS[self.kind])

    @property
    def level(self) -> str:
        """The noise level as papers write it, `boundary(0.7, 0.5)`."""
        if self.kind == "mixed":
            return f"mixed({', '.join(annotator.level for annotator in self.annotators)})"
        values = [f"{getattr(self, name):g}" for name in _NOISE_PARAMETERS[self.kind]]
        return f"{self.kind}({', '.join(values)})" if values else self.kind

    @property
    def looks_at_image(self) -> bool:
        """Whether the noisy mask depends on the image, and not on the true mask alone."""
        return self.kind == "unsupervised" or any(annotator.looks_at_image for annotator in self.annotators or ())


class AugmentConfig(Section):
    """One random geometry for image and mask, colour for the image only. Identity at the defaults."""

    flip: bool = False
    right_angles: bool = False
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation to either side, degrees."""
    scale: Range = (1.0, 1.0)
    """Zoom; above 1 crops, below 1 shows the fill around the frame."""
    shear: Annotated[float, Field(ge=0, lt=60)] = 0.0
    """Largest shear to either side, degrees."""
    translate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest shift to either side, as a fraction of the frame; with scale > 1 this is a random crop."""
    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.0
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0
    saturation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    hue: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest turn of the hue to either side, degrees; the three above are largest relative changes."""
    elastic: Annotated[float, Field(ge=0, le=0.2)] = 0.0
    """Largest displacement of a smooth random deformation, as a fraction of the frame."""
    hairs: Annotated[int, Field(ge=0, le=100)] = 0
    """Most dark hairs to draw across an image; their number is uniform from 0."""
    blur: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Largest deviation of a Gaussian blur, pixels of the network's input."""
    grain: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest deviation of white noise added to the image, of the range of its values."""

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError("scale must be [low, high] with 0 < low <= high")
        return self


class DataConfig(Section):
    root: Path
    """Folder with manifest.csv, or one of the known layouts (distseg/data/manifest.py)."""
    layout: Literal["auto", "manifest", "isic", "ph2", "folders"] = "auto"
    image_size: Annotated[int, Field(ge=8)] = 96
    """Side of the square network input, pixels."""
    clean_count: Annotated[int, Field(ge=0)] = 50
    """K, the images of the training split whose true masks are known; the others are the noisy stream."""
    noise: NoiseConfig = NoiseConfig()
    pipeline: Literal["auto", "dali", "torch"] = "auto"
    """auto: DALI where it imports, the torch loader elsewhere."""
    threads: Count = 1
    """Per stream: as many read and decode, and as many transform."""
    memory: Annotated[float, Field(ge=0)] = 1.0
    """GiB per stream and rank in which images and masks are kept at network resolution once they are decoded."""
    device_memory: Annotated[float, Field(ge=0)] = 1.0
    """The same of a GPU's memory, for images under DALI: if all of a stream fit, they are decoded on the CPU and stay
    there; otherwise each is decoded on the GPU every time. The two decoders differ by a few of 255 grey levels."""
    cache: Path | None = None
    """Folder that `launch/prepare.py --cache` has filled from this data at this image_size."""
    on_bad: Literal["refuse", "skip"] = "refuse"
    """What to do about files that cannot be used: end, or leave their samples out and say so."""
    follow_links: bool = False
    """Allow symbolic links that lead out of the root."""
    augment: AugmentConfig = AugmentConfig()
    val_fraction: Fraction = 0.1
    test_fraction: Fraction = 0.2
    """The split, by seed, of a folder that does not bring its own."""
