"""A run's network as files that need no distseg, each checked against the run on real images.

The graph is `Deployable`: input `images` (B, H, W, 3) uint8 RGB, outputs `masks` (B, H, W) uint8 class ids and
`probabilities` (B, C, H, W) float32.
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

from distseg.data.decode import read_image
from distseg.errors import UserError
from distseg.files import write_atomically
from distseg.inference.graph import Deployable, probabilities_of
from distseg.inference.onnx_file import OnnxGraph, write_onnx
from distseg.inference.predictor import Predictor

INPUTS, OUTPUTS = ("images",), ("masks", "probabilities")
_AXES = {0: "batch", 1: "height", 2: "width"}
_LARGEST_SIDE = 2**16
Size = tuple[int, int]
"""(height, width)."""
Graph = Callable[[NDArray[np.uint8]], Sequence[NDArray[Any]]]
"""`images` to `masks` and `probabilities`."""


@dataclass(frozen=True)
class Check:
    """How far a graph is from the run."""

    images: int
    difference: float
    """The largest of a probability, on the same pixels."""
    iou: float
    """The least of an image and class, of the graph's masks with those of the run; 1 where both are empty."""


def exported(predictor: Predictor, size: Size | None) -> Any:
    """The torch.export program of a run on the CPU, for images of `size`, or with None of any.

    Raises UserError for a network or a shape of data that is no graph.
    """
    data = predictor.data
    module = Deployable(predictor.network, data.frame, data.class_count, size).eval()
    height, width = size or (data.image_size + 13, data.image_size + 29)
    images = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    free = {axis: torch.export.Dim(name, min=1 + (axis > 0), max=_LARGEST_SIDE) for axis, name in _axes(size).items()}
    try:
        program = torch.export.export(module, (images,), dynamic_shapes=(free,))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the network cannot be exported: {type(error).__name__}: {reason}; write its forward without choices that "
            "depend on values or on the number of images"
        ) from None
    program.example_inputs = None  # they would be written beside it, as a pickle
    return program


def write_onnx_graph(program: Any, path: Path, size: Size | None, facts: dict[str, Any]) -> Graph:
    """Write it; what the file gives, in onnxruntime. Raises UserError."""
    write_onnx(program, path, (INPUTS, OUTPUTS), _axes(size), json.dumps(facts, ensure_ascii=False))
    return OnnxGraph(path)


def write_program(program: Any, path: Path, facts: dict[str, Any]) -> Graph:
    """Write torch's archive; what the file gives, read again."""
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"distseg.json": json.dumps(facts, ensure_ascii=False)})
    write_atomically(path, content.getvalue())
    content.seek(0)
    module = torch.export.load(content).module()

    def graph(images: NDArray[np.uint8]) -> list[NDArray[Any]]:
        with torch.inference_mode():
            return [each.numpy() for each in module(torch.from_numpy(images))]

    return graph


def check_graph(predictor: Predictor, graph: Graph, images: Sequence[Path], size: Size | None) -> Check:
    """Hold a graph against its run. Images are reduced or enlarged to `size` first, where the graph has one.

    Probabilities are compared on the same pixels. Masks are those of the files where their size is free: the run may
    decode a JPEG at a reduced size, which a graph cannot. Raises BadFileError.
    """
    difference, iou = 0.0, 1.0
    with tempfile.TemporaryDirectory() as folder:
        lossless = Path(folder) / "image.png"
        for path in images:
            pixels = read_image(path, predictor.data.decoding)
            if size is not None:
                pixels = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
            Image.fromarray(pixels).save(lossless, compress_level=1)
            masks, probabilities = graph(pixels[None])
            canvas = predictor.read(lossless)
            logits = torch.cat([*next(predictor.strips([canvas]))], dim=1)[None]
            expected = probabilities_of(logits, predictor.data.class_count).numpy()
            difference = max(difference, float(np.abs(probabilities - expected).max()))
            file = lossless if size else path
            [prediction] = predictor.predict([predictor.read(file)])
            iou = min(iou, _least_iou(masks[0], prediction.mask, predictor.data.class_count))
    return Check(len(images), difference, iou)


def _axes(size: Size | None) -> dict[int, str]:
    """Those that are free, by their place in `images`."""
    return _AXES if size is None else {0: _AXES[0]}


def _least_iou(mask: NDArray[np.uint8], other: NDArray[np.uint8], class_count: int) -> float:
    values = []
    for place in range(1, class_count):
        union = np.count_nonzero((mask == place) | (other == place))
        values.append(np.count_nonzero((mask == place) & (other == place)) / union if union else 1.0)
    return min(values)
