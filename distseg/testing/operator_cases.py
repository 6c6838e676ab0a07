"""The operators' test matrix: awkward inputs, and every operator with its derivatives against float64 eager torch.

One list for every backend and device: tests/ops runs it on the CPU, tests/gpu on a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distseg import ops
from distseg.labels.distances import INSIDE_EDGES, OUTSIDE_EDGES
from distseg.ops import IGNORE, reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}
"""Of maps and sums, relative to 1 or the largest value: half-precision logits are read exactly, then float32."""
LOGITS_TOLERANCE = TOLERANCE | {torch.bfloat16: 1.5 * 2**-7, torch.float16: 1.5 * 2**-10}
"""Of gradients in the logits, rounded to their dtype when made (Triton's interpreter truncates) and when scaled."""


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    labels: torch.dtype = torch.uint8
    layout: str = "contiguous"
    """Or `channels_last`, or `strided`: every second column of wider tensors."""
    largest: float = 4.0
    """Size of the logits."""
    ignored: float = 0.15
    """Share of the pixels."""
    weights: float = 1.0
    """Size of the weights."""
    poisoned: bool = False
    """NaN in everything at ignored pixels."""


CASES = [
    *(
        Case(f"{dtype}-{channels}-{layout}".removeprefix("torch."), (2, channels, 13, 29), dtype, layout=layout)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        for channels in (1, 2, 3, 8)
        for layout in ("contiguous", "channels_last", "strided")
    ),
    *(
        Case(f"{channels}-{name}", shape, **options)
        for channels in (1, 5)
        for name, shape, options in (
            ("int64 labels", (2, channels, 7, 11), {"labels": torch.int64}),
            ("several tiles", (1, channels, 61, 83), {}),
            ("several tiles, channels last", (1, channels, 61, 83), {"layout": "channels_last"}),
            ("no image", (0, channels, 7, 11), {}),
            ("one pixel", (1, channels, 1, 1), {"ignored": 0.0}),
            ("one ignored pixel", (1, channels, 1, 1), {"ignored": 1.0}),
            ("all ignored", (2, channels, 7, 11), {"ignored": 1.0, "poisoned": True}),
            ("none ignored", (2, channels, 7, 11), {"ignored": 0.0}),
            ("weights all zero", (2, channels, 7, 11), {"weights": 0.0}),
            ("logits of 1e4", (2, channels, 7, 11), {"largest": 1e4}),
            ("logits of 1e4 in bfloat16", (2, channels, 7, 11), {"largest": 1e4, "dtype": torch.bfloat16}),
            ("NaN where ignored", (2, channels, 13, 29), {"poisoned": True}),
            ("NaN where ignored, channels last", (2, channels, 13, 29), {"poisoned": True, "layout": "channels_last"}),
            ("NaN where ignored, bfloat16", (2, channels, 13, 29), {"poisoned": True, "dtype": torch.bfloat16}),
        )
    ),
    Case("5-a few tiles", (1, 5, 19, 23)),
    Case("20 classes", (1, 20, 7, 11)),
    Case("many classes", (1, 150, 7, 11)),
    Case("many classes, channels last", (1, 150, 7, 11), layout="channels_last"),
]

ANNOTATORS, BINS = 3, 7
"""Of the label model's cases."""


@dataclass(frozen=True)
class Inputs:
    """Of one case; `clean_` are the same in float64, without NaN: what the oracle is given."""

    logits: Tensor
    tangents: Tensor
    masks: Tensor
    weights: Tensor
    scale: Tensor
    level: Tensor
    upstream: Tensor
    """Of a map, pixel by pixel."""
    class_weights: Tensor
    """(max(2, C),), above 0."""
    bins: Tensor
    """(B, 2, H, W) of two annotations of each image, some of them 255."""
    annotators: Tensor
    """(B, 2), some of them −1."""
    tables: Tensor
    """(3, max(2, C), 7)."""
    calibration: Tensor
    """(max(2, C),)."""

    @classmethod
    def draw(cls, case: Case, device: torch.device | str) -> tuple["Inputs", "Inputs"]:
        """The inputs of a case on `device`, and the oracle's: the same numbers in float64 with 0 in place of NaN."""
        generator = torch.Generator().manual_seed(0)
        batch, channels, height, width = case.shape
        acc = torch.float64 if case.dtype == torch.float64 else torch.float32

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        masks = torch.randint(0, max(2, channels), (batch, height, width), generator=generator).to(case.labels)
        ignored = torch.rand(masks.shape, generator=generator) < case.ignored
        masks[ignored] = IGNORE
        clean = cls(
            logits=(normal(*case.shape) * case.largest).to(case.dtype),
            tangents=normal(*case.shape).to(case.dtype),
            masks=masks,
            weights=(normal(batch, height, width).abs() * case.weights).to(acc),
            scale=normal(batch).abs().to(acc),
            level=(normal(batch).abs() * case.weights).to(acc),
            upstream=normal(batch, height, width).to(acc),
            class_weights=(0.5 + torch.rand(max(2, channels), generator=generator, dtype=torch.float64)).to(acc),
            bins=torch.where(
                torch.rand(batch, 2, height, width, generator=generator) < 0.1,
                IGNORE,
                torch.randint(0, BINS, (batch, 2, height, width), generator=generator),
            ).to(torch.uint8),
            annotators=torch.randint(-1, ANNOTATORS, (batch, 2), generator=generator),
            tables=normal(ANNOTATORS, max(2, channels), BINS).to(acc),
            calibration=normal(max(2, channels)).to(acc),
        )

        def placed(tensor: Tensor) -> Tensor:
            of_pixels = tensor.shape[-2:] == masks.shape[-2:]
            if case.poisoned and tensor.is_floating_point() and of_pixels:
                tensor = tensor.masked_fill(ignored if tensor.ndim == 3 else ignored[:, None], torch.nan)
            tensor = tensor.to(device)
            if case.layout == "channels_last" and tensor.ndim == 4:
                return tensor.contiguous(memory_format=torch.channels_last)
            if case.layout == "strided" and of_pixels:
                return tensor.repeat_interleave(2, -1)[..., ::2]
            return tensor

        numbers = vars(clean)
        oracle = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in numbers.items()}
        return cls(**{name: placed(tensor) for name, tensor in numbers.items()}), cls(**oracle)


def results(case: Case, inputs: Inputs, oracle: bool) -> Iterator[tuple[str, Tensor]]:
    """Every operator and its derivatives on `inputs`, by name; those of reference.py if `oracle`."""
    z = inputs.logits.detach().requires_grad_()
    w = inputs.weights.detach().requires_grad_()
    t, y, scale, level = inputs.tangents, inputs.masks, inputs.scale, inputs.level
    operators = reference if oracle else ops

    def loss(logits: Tensor, weights: Tensor | None) -> Tensor:
        value = operators.weighted_loss(logits, y, weights, scale, level)
        return value.sum() if oracle else value

    yield "alignment", operators.alignment(z.detach(), t, y)
    positive, sums = operators.positive_alignment(z.detach(), t, y)
    yield "positive_alignment", positive
    yield "positive_alignment sums", sums[:, :4]  # how many are 0 hangs on the last bit

    value = operators.pixel_loss(z, y)
    yield "pixel_loss", value
    [gradient] = torch.autograd.grad(value, z, inputs.upstream)
    yield "pixel_loss ∂z", gradient

    value = loss(z, w)
    yield "weighted_loss", value
    for factor in (1.0, 0.7):
        for_z, for_w = torch.autograd.grad(factor * value, (z, w), retain_graph=True)
        yield f"weighted_loss {factor} ∂z", for_z
        yield f"weighted_loss {factor} ∂w", for_w
    yield "weighted_loss without map", loss(z.detach(), None)
    [gradient] = torch.autograd.grad(loss(z, None), z)
    yield "weighted_loss without map ∂z", gradient

    upstream = torch.tensor(0.7, dtype=scale.dtype, device=scale.device, requires_grad=True)
    [gradient] = torch.autograd.grad(upstream * loss(z, w), z, create_graph=True)
    for name, twice in zip("zwu", torch.autograd.grad(gradient, (z, w, upstream), t), strict=True):
        yield f"double backward ∂{name}", twice

    for share, smooth, given in ((0.6, 1e-3, inputs.weights), (1.0, 0.0, None)):
        options = {"dice": share, "smooth": smooth}
        if oracle:
            by_image = inputs.class_weights.expand(len(y), -1)
            value = reference.dice_cross_entropy(z, y, given, scale, level, by_image, **options).sum()
        else:
            value = ops.dice_cross_entropy(z, y, given, scale, level, class_weights=inputs.class_weights, **options)
        name = f"dice_cross_entropy {share}" + (" without map" if given is None else "")
        yield name, value
        [gradient] = torch.autograd.grad(0.7 * value, z)
        yield f"{name} ∂z", gradient

    aligned = inputs.weights - 0.5
    for cell in (1, 3, 8, 200):
        positive, sums = operators.positive_part(aligned, y, cell)
        yield f"positive_part {cell}", positive
        yield f"positive_part {cell} sums", sums[:, :4]
    drawn = inputs.bins, inputs.annotators, inputs.tables, inputs.calibration
    labels, sums = correction(z.detach(), y, *drawn, oracle=oracle)
    yield "correct_labels", labels
    yield "correct_labels sums", sums
    yield "normalise", operators.normalise(inputs.weights, y, scale, level)
    yield "normalise without map", operators.normalise(None, y, scale, level)


def correction(z: Tensor, y: Tensor, bins: Tensor, *model: Tensor, oracle: bool = False) -> tuple[Tensor, Tensor]:
    """`ops.correct_labels`; from reference.py if `oracle`."""
    if not oracle:
        return ops.correct_labels(z, y, bins, *model)
    with ops.using("reference"):
        return ops.correct_labels(z, y, bins, *model)


def check(case: Case, device: torch.device | str = "cpu") -> None:
    """AssertionError unless what serves `device` agrees with float64 eager torch in every result of the case."""
    inputs, clean = Inputs.draw(case, device)
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32
    expected = dict(results(case, clean, oracle=True))
    for name, actual in results(case, inputs, oracle=False):
        if name == "correct_labels":
            assert actual.dtype == case.labels and torch.equal(actual.cpu(), expected[name]), name
            continue
        of_logits = actual.ndim == 4
        assert actual.dtype == (torch.float64 if "sums" in name else case.dtype if of_logits else acc), name
        assert actual.shape == expected[name].shape, name
        if of_logits and case.layout == "channels_last" and ops.backend(device) != "reference":
            assert actual.is_contiguous(memory_format=torch.channels_last), name
        tolerance = (LOGITS_TOLERANCE if of_logits else TOLERANCE)[case.dtype]
        scale = _scale(name, expected)
        torch.testing.assert_close(
            actual.cpu().double(), expected[name], rtol=0, atol=tolerance * scale, msg=partial("{}: {}".format, name)
        )


@dataclass(frozen=True)
class MaskCase:
    name: str
    shape: tuple[int, int, int]
    classes: int = 2
    labels: torch.dtype = torch.uint8
    layout: str = "contiguous"
    """Or `strided`: every second column of wider masks."""
    size: float = 8.0
    """Of the objects, about, in pixels."""
    fill: int | None = None
    """The class of every pixel; None: objects of all classes."""
    ignored: float = 0.05
    """Share of the pixels."""

    def draw(self, device: torch.device | str = "cpu") -> Tensor:
        """Masks with objects of every class, one without any, and labels that are no class."""
        generator = torch.Generator().manual_seed(len(self.name))
        images, height, width = self.shape
        if self.fill is not None or not images * height * width:
            return torch.full(self.shape, self.fill or 0, dtype=self.labels, device=device)
        coarse = [max(2, round(side / self.size) + 1) for side in (height, width)]
        field = torch.rand(images, 1, *coarse, generator=generator)
        field = torch.nn.functional.interpolate(field, (height, width), mode="bilinear", align_corners=True)[:, 0]
        masks = ((field - 0.45) * 2.5 * (self.classes - 1)).ceil().clamp(0, self.classes - 1).to(self.labels)
        if images > 1:
            masks[-1] = 0
        kind = torch.rand(self.shape, generator=generator)
        masks[kind < self.ignored] = IGNORE
        masks[kind > 1 - self.ignored / 5] = self.classes  # is no class
        masks = masks.to(device)
        return masks.repeat_interleave(2, -1)[..., ::2] if self.layout == "strided" else masks


MASK_CASES = [
    MaskCase("two classes", (3, 37, 53)),
    MaskCase("two classes of int64, strided", (2, 37, 53), labels=torch.int64, layout="strided"),
    MaskCase("one object", (1, 61, 83), size=40.0, ignored=0.0),
    MaskCase("three classes", (2, 41, 47), classes=3),
    MaskCase("41 classes", (1, 31, 67), classes=41, size=30.0),
    MaskCase("a row", (2, 1, 61)),
    MaskCase("a column", (2, 61, 1)),
    MaskCase("wider than a tile", (1, 3, 1031), size=200.0),
    MaskCase("taller than a tile", (1, 67, 5), size=40.0),
    MaskCase("small objects, far apart", (1, 47, 71), size=2.5, ignored=0.0),
    MaskCase("one pixel", (1, 1, 1), fill=1),
    MaskCase("no object", (2, 7, 11), fill=0),
    MaskCase("all of one class", (2, 7, 11), classes=3, fill=2),
    MaskCase("all ignored", (1, 7, 11), fill=IGNORE),
    MaskCase("no image", (0, 7, 11)),
    MaskCase("no row", (2, 0, 11)),
    MaskCase("no column", (2, 7, 0)),
]


def check_bins(case: MaskCase, device: torch.device | str = "cpu") -> None:
    """AssertionError unless what serves `device` has the same bins as eager torch, bit for bit."""
    masks = case.draw(device)
    for area in (0, 144):
        actual = ops.signed_distance_bins(masks, case.classes, OUTSIDE_EDGES, INSIDE_EDGES, area)
        expected = reference.signed_distance_bins(masks.cpu(), case.classes, OUTSIDE_EDGES, INSIDE_EDGES, area)
        assert actual.dtype == torch.uint8 and torch.equal(actual.cpu(), expected)


def _scale(name: str, expected: dict[str, Tensor]) -> float:
    """1, the size of softmax − onehot; or a larger result; or the sum of its terms' sizes, where signs differ."""
    values = expected["double backward ∂w"].abs().sum() if name == "double backward ∂u" else expected[name]
    return max(1.0, values.abs().max().item()) if values.numel() else 1.0
