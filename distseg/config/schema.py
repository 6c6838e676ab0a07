"""The experiment's configuration: typed, frozen, and every unknown key is an error."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Range = tuple[float, float]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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


class ModelConfig(Section):
    name: str = "unet"
    """`unet`, or an importable `package.module:callable` that returns an nn.Module."""
    width: Count = 64
    depth: Annotated[int, Field(ge=1, le=8)] = 4
    """Number of downsamplings; the paper's network has width 64 and depth 4."""
    norm: Literal["none", "batch", "group"] = "none"
    options: dict[str, Any] = {}
    """Keyword arguments of an imported model; must be empty for `unet`."""

    @model_validator(mode="after")
    def _options_are_for_imports(self) -> Self:
        if self.name == "unet" and self.options:
            raise ValueError("options are for imported models; unet takes width, depth and norm")
        if self.name != "unet" and ":" not in self.name:
            raise ValueError(f"name {self.name!r} is neither `unet` nor `package.module:callable`")
        return self


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
    """What each does: distseg/training/methods/__init__.py."""
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


class OptimConfig(Section):
    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 1e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """sgd only; adam and adamw use betas (0.9, 0.999)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "step", "cosine", "one_cycle"] = "constant"
    milestones: tuple[Fraction, ...] = (1 / 3, 2 / 3)
    """step: where the rate is multiplied by gamma, as fractions of the steps."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    implementation: Literal["auto", "apex", "torch"] = "auto"


class TrainConfig(Section):
    steps: Count | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the noisy stream; every method gets the same number of steps."""
    batch_size: Count = 6
    clean_batch_size: Count = 6
    """Both per rank and micro-batch. A run may be resumed with others if their products with accumulation and the
    number of ranks, the images of a step, stay what they were."""
    accumulation: Count = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is torch autocast in the weighted step; the meta pass stays in fp32."""
    log_every: Count = 10
    validate_every: Count | None = None
    """Steps between validations; default: ten times a run."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints; default: at each validation."""
    keep_checkpoints: Count = 2
    """The newest ones that stay, beside the one of the best validation."""
    max_bad_steps: Count = 5
    """A run stops after so many steps in a row whose loss or gradient is not finite; each of them is skipped."""
    figure_every: Count | None = None
    """Steps between weight-map figures; default: at each validation."""

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of steps and epochs")
        return self


class DeepSpeedConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 0
    """3: parameters lie in shards, and the meta pass gathers each for as long as an operator needs it."""
    gradient_clipping: Annotated[float, Field(ge=0)] = 0.0
    config_file: Path | None = None
    """JSON with further DeepSpeed keys, for instance bucket sizes (configs/deepspeed/)."""


class TrackingConfig(Section):
    mlflow: bool = True
    uri: str | None = None
    """default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the working folder."""
    experiment: str = "distseg"
    system_metrics: bool = True
    log_model: bool = False
    """Also log the network of the last step, as an exported graph with signature and input example."""
    parent_run: str | None = None
    """MLflow id of the run that this one is nested under."""
    tags: dict[str, str] = {}
    """Further tags, over those that follow from the config."""


class Config(Section):
    """One experiment. `configs/*.yaml` are of this type; see README for the sections in a table."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataConfig
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        stride = 2**self.model.depth
        if self.model.name == "unet" and self.data.image_size % stride:
            raise ValueError(
                f"data.image_size {self.data.image_size} must be a multiple of {stride} (2**model.depth) for unet"
            )
        if self.data.clean_count == 0 and self.method.needs_clean:
            raise ValueError(f"data.clean_count 0: {self.method.name} learns from clean images; set it to 1 or more")
        if self.method.name == "meta_weight_net" and self.deepspeed.zero_stage == 3:
            raise ValueError("deepspeed.zero_stage 3: meta_weight_net needs whole parameters; set it to 2 or less")
        if self.method.name == "union" and self.train.batch_size % 2:
            raise ValueError(f"train.batch_size {self.train.batch_size} must be even for union, half and half")
        return self
