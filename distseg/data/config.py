"""The `data` section of a config."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from distseg.data.classes import ClassMap, class_map
from distseg.data.decode import Decoding
from distseg.data.findings import FindingName
from distseg.data.geometry import Frame, Shape
from distseg.data.layouts import LAYOUTS
from distseg.data.noise.config import NoiseConfig
from distseg.data.noise.none import NoNoise
from distseg.section import Fraction, Range, Section

_MOST_GIB = 2**20


def _without_tilde(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: no such user; write the folder out") from None


Folder = Annotated[Path, AfterValidator(_without_tilde)]


def _known_layout(name: str) -> str:
    if name not in ("auto", *LAYOUTS):
        raise ValueError(f"must be {' | '.join(('auto', *LAYOUTS))}")
    return name


def _file_values(given: Any) -> Any:
    """One value or a list of them as a list, colours in lower case. Raises ValueError for what no mask holds."""
    values = [given] if isinstance(given, str | int | float) else given
    if not isinstance(values, list | tuple):
        raise ValueError(f"give a value or a list of values, for instance [1, 2]{_VALUES}")
    for value in values:
        is_number = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 65535
        if not (is_number or (isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value))):
            raise ValueError(f"{value!r} is no value of a mask{_VALUES}")
    return [value.lower() if isinstance(value, str) else value for value in values]


def _named_classes(given: Any) -> Any:
    """Without the classes whose values are null, which takes back what a file names."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError("give a mapping from names to values, for instance {background: 0, lesion: [1, 2]}")
    for name in given:
        if not (isinstance(name, str) and re.fullmatch(r"\w([\w. -]{0,62}\w)?", name)):
            raise ValueError(f"the name {name!r}: take letters and digits, between them blanks, . _ and -, up to 64")
    return {name: values for name, values in given.items() if values is not None}


_VALUES = '; values are numbers from 0 to 65535 as a file stores them, or colours in quotes, "#rrggbb"'
_FileValues = Annotated[tuple[int | str, ...], BeforeValidator(_file_values)]
_Classes = Annotated[dict[str, _FileValues] | None, BeforeValidator(_named_classes)]


class AugmentConfig(Section):
    """One random geometry for image and mask, colour for the image only. Identity at the defaults."""

    flip: bool = False
    """Flip at random, each way with probability ½."""
    right_angles: bool = False
    """Turn by a random multiple of 90 degrees."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation to either side, degrees."""
    scale: Range = (1.0, 1.0)
    """Zoom; above 1 crops, below 1 shows the fill around the frame."""
    shear: Annotated[float, Field(ge=0, lt=60)] = 0.0
    """Largest shear to either side, degrees."""
    translate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest shift to either side, as a fraction of the frame; with scale > 1 this is a random crop."""
    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest relative change of brightness."""
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest relative change of contrast."""
    saturation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest relative change of saturation."""
    hue: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest turn of the hue to either side, degrees."""
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


class FoldConfig(Section):
    count: Annotated[int, Field(ge=2, le=1000)]
    """Into how many folds the noisy images are divided, whole groups each, by `data.split_seed`."""
    index: Annotated[int, Field(ge=0)]
    """Which of them is left out, from 0."""

    @model_validator(mode="after")
    def _index_is_of_a_fold(self) -> Self:
        if self.index >= self.count:
            raise ValueError(f"index {self.index}: there are the folds 0 to {self.count - 1}")
        return self


class DataConfig(Section):
    root: Folder
    """Folder with manifest.csv, or one of the known layouts (distseg/data/layouts/)."""
    layout: Annotated[str, AfterValidator(_known_layout)] = "auto"
    """How the files lie in the folder; auto takes the first layout that fits."""
    image_size: Annotated[int, Field(ge=8, le=8192)] = 96
    """Side of the square network input, pixels."""
    shape: Shape = "squash"
    """How a file becomes that square. squash: both sides are resampled to it, as in the paper. letterbox: the longer
    side is, the aspect stays and the rest is padding, which neither trains nor counts. crop: random windows of the file
    at data.scale; validation and test cover the whole file by tiles."""
    scale: Annotated[float, Field(gt=0, le=4)] = 1.0
    """Of shape crop: pixels of the network's input per pixel of a file."""
    overlap: Annotated[float, Field(ge=0, le=0.75)] = 0.25
    """Of shape crop: the least share of a tile's side that the next one covers too, where their logits are blended."""
    score_own: Literal["never", "test", "always"] = "test"
    """When to score at the files' own resolution too, test/own/dice beside test/dice: always is at every validation."""
    clean_count: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """null: the clean stream is what has a reference mask, the noisy stream what has annotations alone. K: a study, in
    which that many references, drawn by the run's seed, are known, and the others' serve diagnostics alone."""
    expert: str = ""
    """The annotator whose masks are the references, where the data says whose masks they are and not which count."""
    annotators: Literal["drawn", "majority", "staple", "all"] = "drawn"
    """What is learned from where an image has several annotations: one drawn by seed each time, the class that most of
    them mark, STAPLE's estimate (Warfield et al. 2004; needs SimpleITK), or all of them, for labels of kind corrected;
    until these are corrected, they are the class that most mark."""
    classes: _Classes = None
    """The classes and the values that mean each in a mask's file, background first: numbers as they are stored (greys
    of 1 to 16 bits, indices of a palette) or colours, "#rrggbb". null: background is 0, lesion 1 or 255."""
    ignore: _FileValues = ()
    """Values of pixels that nobody vouches for: nothing is learned from them, and nothing scored on them."""
    threshold: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Of grey masks: from this value on a pixel is lesion. For two classes, in place of `classes`."""
    noise: NoiseConfig = NoNoise()
    pipeline: Literal["auto", "dali", "torch"] = "auto"
    """auto: DALI where it imports, the torch loader elsewhere."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Per stream: as many read and decode, and as many transform. More than one helps where files are large."""
    memory: Annotated[float, Field(ge=0, le=_MOST_GIB)] = 1.0
    """GiB per stream and rank in which images and masks are kept at network resolution once they are decoded."""
    device_memory: Annotated[float, Field(ge=0, le=_MOST_GIB)] = 1.0
    """The same of a GPU's memory, for images under DALI: if all of a stream fit, they are decoded on the CPU and stay
    there; otherwise each is decoded on the GPU every time. The two decoders differ by a few of 255 grey levels."""
    cache: Folder | None = None
    """Folder that `launch/prepare.py --cache` has filled from this data at this image_size."""
    on_bad: Literal["refuse", "skip"] = "refuse"
    """What to do about files that cannot be used: end, or leave their samples out and say so."""
    allow: tuple[FindingName, ...] = ()
    """Findings about the data that are neither refused nor warned of (docs/your_data.md), for instance [near_twins]."""
    follow_links: bool = False
    """Allow symbolic links that lead out of the root."""
    orientation: Literal["apply", "ignore"] = "apply"
    """apply: pixels are turned as a file's EXIF orientation says, as annotation tools show them. ignore: image and mask
    are taken as stored, for masks that were drawn so."""
    max_file_bytes: Annotated[int, Field(ge=1, lt=2**40)] = 2**29
    """Larger files are refused unread."""
    max_pixels: Annotated[int, Field(ge=1, le=2**30)] = 2**26
    """Larger pictures are refused before they are decoded. The largest ISIC images have 6000×4000."""
    max_scans: Annotated[int, Field(ge=1, le=2**20)] = 100
    """JPEGs of more scans are refused before they are decoded. Each takes as long as decoding the picture once, so that
    this bounds the time; cameras write one, and progressive files about ten."""
    augment: AugmentConfig = AugmentConfig()
    val_fraction: Fraction = 0.1
    test_fraction: Fraction = 0.2
    """About this much of the training images, where the data does not bring the split (distseg/data/splits.py)."""
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Draws the splits that the data does not bring: the same for all seeds of a study."""

    fold: FoldConfig | None = None
    """Leave one fold of the noisy images out of the training, so that the network can judge their masks: for
    `distseg audit --folds`, which sets it."""

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.orientation, self.max_file_bytes, self.max_pixels, self.max_scans, self.class_map)

    @property
    def class_map(self) -> ClassMap:
        return class_map(self.classes, self.ignore, self.threshold)

    @property
    def class_names(self) -> tuple[str, ...]:
        """By id, background first."""
        return self.class_map.names

    @property
    def class_count(self) -> int:
        return len(self.class_names)

    @model_validator(mode="after")
    def _values_are_of_one_class(self) -> Self:
        _ = self.class_map
        if self.noise.looks_at_image and self.class_count > 2:
            raise ValueError(
                f"noise.kind {self.noise.kind}: finds one region in the image and knows no classes; choose a kind that "
                "draws from masks, for instance noise.kind=boundary"
            )
        return self

    @property
    def frame(self) -> Frame:
        return Frame(self.image_size, self.shape, self.scale)

    @model_validator(mode="after")
    def _keys_apply_to_the_shape(self) -> Self:
        fields = type(self).model_fields
        for key in ("scale", "overlap"):
            if self.shape != "crop" and getattr(self, key) != fields[key].default:
                raise ValueError(f"{key} {getattr(self, key)}: applies to shape crop alone, not to {self.shape}")
        if self.shape == "crop" and self.cache is not None:
            raise ValueError(f"cache {self.cache}: holds images of one size, which crops are not; leave it out")
        return self

    @model_validator(mode="after")
    def _fractions_leave_training_images(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction must be below 1: the rest is what is trained on")
        return self
