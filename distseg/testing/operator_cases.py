"""The operators' test matrix: awkward inputs, and every operator with its derivatives against float64 eager torch.

One list for every backend and device: tests/ops runs it on the CPU, tests/gpu on a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distseg import ops
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
    Case("many classes", (1, 150, 7, 11)),
    Case("many classes, channels last", (1, 150, 7, 11), layout="channels_last"),
]


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
        )

        def placed(tensor: Tensor) -> Tensor:
            if case.poisoned and tensor.is_floating_point() and tensor.ndim > 1:
                tensor = tensor.masked_fill(ignored if tensor.ndim == 3 else ignored[:, None], torch.nan)
            tensor = tensor.to(device)
            if case.layout == "channels_last" and tensor.ndim == 4:
                return tensor.contiguous(memory_format=torch.channels_last)
            if case.layout == "strided" and tensor.ndim > 1:
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
    yield "normalise", operators.normalise(inputs.weights, y, scale, level)
    yield "normalise without map", operators.normalise(None, y, scale, level)


def check(case: Case, device: torch.device | str = "cpu") -> None:
    """AssertionError unless what serves `device` agrees with float64 eager torch in every result of the case."""
    inputs, clean = Inputs.draw(case, device)
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32
    expected = dict(results(case, clean, oracle=True))
    for name, actual in results(case, inputs, oracle=False):
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


def _scale(name: str, expected: dict[str, Tensor]) -> float:
    """1, the size of softmax − onehot; or a larger result; or the sum of its terms' sizes, where signs differ."""
    values = expected["double backward ∂w"].abs().sum() if name == "double backward ∂u" else expected[name]
    return max(1.0, values.abs().max().item()) if values.numel() else 1.0
