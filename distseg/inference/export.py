"""A run's network as files that need no distseg, each checked against the run on real images.

The graph is `Deployable`: inputs `images` (B, h, w, 3) uint8 RGB and, where it is for any size, `size` (2,) int64,
H and W; outputs `masks` (B, H, W) uint8 class ids and `probabilities` (B, C, H, W) float32.
"""

import io
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from distseg.data.decode import read_image, read_reduced
from distseg.errors import UserError
from distseg.files import write_atomically
from distseg.inference.graph import LARGEST_SIDE, Deployable, probabilities_of
from distseg.inference.onnx_file import OnnxGraph, quiet, write_onnx
from distseg.inference.predictor import Predictor

INPUTS, OUTPUTS = ("images", "size"), ("masks", "probabilities")
_AXES = {0: "batch", 1: "height", 2: "width"}
Size = tuple[int, int]
"""(height, width)."""
Graph = Callable[..., Sequence[NDArray[Any]]]
"""`images`, and `size` where it is for any, to `masks` and `probabilities`."""


@dataclass(frozen=True)
class Check:
    """How far a graph is from the run."""

    images: int
    difference: float
    """The largest of a probability."""
    iou: float
    """The least of an image and class, of the graph's masks with those of the run; 1 where both are empty."""


def exported(predictor: Predictor, size: Size | None) -> Any:
    """The torch.export program of a run on the CPU, for images of `size`, or with None of any.

    Raises UserError for a network or a shape of data that is no graph.
    """
    data = predictor.data
    module = Deployable(predictor.network, data.frame, data.class_count, size).eval()
    height, width = size or (data.image_size + 13, data.image_size + 29)
    inputs = [torch.zeros(2, height, width, 3, dtype=torch.uint8), torch.tensor([height, width])]
    free = {axis: torch.export.Dim(name, min=1 + (axis > 0), max=LARGEST_SIDE) for axis, name in _axes(size).items()}
    count = len(_inputs(size))
    try:
        program = torch.export.export(module, tuple(inputs[:count]), dynamic_shapes=(free, None)[:count])
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the network cannot be exported: {type(error).__name__}: {reason}; write its forward without choices that "
            "depend on values or on the number of images"
        ) from None
    program.example_inputs = None  # no part of the file
    return program


def write_onnx_graph(program: Any, path: Path, size: Size | None, facts: dict[str, Any]) -> Graph:
    """Write it; what the file gives, in onnxruntime. Raises UserError."""
    write_onnx(program, path, (_inputs(size), OUTPUTS), _axes(size), json.dumps(facts, ensure_ascii=False))
    return OnnxGraph(path)


def write_program(program: Any, path: Path, facts: dict[str, Any]) -> Graph:
    """Write torch's archive; what the file gives, read again."""
    content = io.BytesIO()
    with quiet("torch._export"):
        torch.export.save(program, content, extra_files={"distseg.json": json.dumps(facts, ensure_ascii=False)})
        write_atomically(path, content.getvalue())
        content.seek(0)
        module = torch.export.load(content).module()

    def graph(*inputs: NDArray[Any]) -> list[NDArray[Any]]:
        with torch.inference_mode():
            return [each.numpy() for each in module(*map(torch.from_numpy, inputs))]

    return graph


def check_graph(predictor: Predictor, graph: Graph, images: Sequence[Path], size: Size | None) -> Check:
    """Hold a graph against its run on files; they are resampled to `size` first, where the graph has one.

    JPEGs are decoded as the run does it. Raises BadFileError.
    """
    difference, iou = 0.0, 1.0
    with tempfile.TemporaryDirectory() as folder:
        for path in images:
            if size is None:
                pixels, own = read_reduced(path, predictor.data.frame, predictor.data.decoding)
                masks, probabilities = graph(pixels[None], np.array(own))
            else:
                image = Image.fromarray(read_image(path, predictor.data.decoding))
                resized = image.resize(size[::-1], Image.Resampling.BILINEAR)
                path = Path(folder) / "image.png"
                resized.save(path, compress_level=1)
                masks, probabilities = graph(np.asarray(resized)[None])
            logits = torch.cat([*next(predictor.strips([predictor.read(path)]))], dim=1)[None]
            expected = probabilities_of(logits, predictor.data.class_count).numpy()
            difference = float(np.maximum(difference, np.abs(probabilities - expected).max()))  # NaN stays
            [prediction] = predictor.predict([predictor.read(path)])
            iou = min(iou, _least_iou(masks[0], prediction.mask, predictor.data.class_count))
    return Check(len(images), difference, iou)


def _inputs(size: Size | None) -> tuple[str, ...]:
    return INPUTS if size is None else INPUTS[:1]


def _axes(size: Size | None) -> dict[int, str]:
    """Those that are free, by their place in `images`."""
    return _AXES if size is None else {0: _AXES[0]}


def _least_iou(mask: NDArray[np.uint8], other: NDArray[np.uint8], class_count: int) -> float:
    values = []
    for place in range(1, class_count):
        union = np.count_nonzero((mask == place) | (other == place))
        values.append(np.count_nonzero((mask == place) & (other == place)) / union if union else 1.0)
    return float(min(values))
