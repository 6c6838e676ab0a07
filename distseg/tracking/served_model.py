"""What `mlflow models serve` runs: the bytes of an image in, its mask as a PNG out.

MLflow copies this file into each model, which so is no pickle; it needs nothing else of distseg. Two artifacts lie
beside it: the ONNX graph, and the facts of the export (export.json), which say how files are read and written.
"""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray
from PIL import Image, ImageOps

_ORIENTATION = 0x0112


class Segmenter(PythonModel):
    def load_context(self, context: Any) -> None:
        self._facts = json.loads(Path(context.artifacts["facts"]).read_text(encoding="utf-8"))
        self._graph = onnxruntime.InferenceSession(context.artifacts["graph"], providers=["CPUExecutionProvider"])
        self._inputs = [each.name for each in self._graph.get_inputs()]
        Image.MAX_IMAGE_PIXELS = self._facts["reading"]["max_pixels"]

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A row an image: the column `image` holds its file, `mask` a PNG of the same height and width.

        The mask's values are those of `distseg predict`. Raises MlflowException, answered as a bad request, where a
        file cannot be read.
        """
        rows = []
        for number, content in enumerate(model_input["image"]):
            pixels, size = self._pixels(content, number)
            inputs = {"images": pixels[None], "size": np.array(size)}
            [mask], _ = self._graph.run(None, {name: inputs[name] for name in self._inputs})
            rows.append({"mask": self._png(mask), "height": mask.shape[0], "width": mask.shape[1]})
        return pd.DataFrame(rows, columns=["mask", "height", "width"])

    def _pixels(self, content: bytes, number: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """(h, w, 3), and the height and width of the file: a JPEG is decoded at a part of it where that is enough."""
        reading, fixed = self._facts["reading"], self._facts["input"]["size"]
        try:
            if content.startswith(b"\xff\xd8") and (scans := content.count(b"\xff\xda")) > reading["max_scans"]:
                raise ValueError(f"{scans} scans are more than {reading['max_scans']}")
            with Image.open(io.BytesIO(content), formats=reading["formats"]) as image:
                if image.width * image.height > reading["max_pixels"]:
                    raise ValueError(f"{image.width}×{image.height} are more than {reading['max_pixels']} pixels")
                turned = reading["orientation"] == "apply" and image.getexif().get(_ORIENTATION, 1) != 1
                size = image.height, image.width
                if fixed is None and not turned:
                    image.draft(None, _twice_the_input(image.width, image.height, self._facts["model"]))
                pixels = np.array((ImageOps.exif_transpose(image) if turned else image).convert("RGB"))
        except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError and more
            raise _bad_request(f"image {number} cannot be read: {' '.join(str(error).split())[:200]}") from None
        if turned:
            size = pixels.shape[0], pixels.shape[1]
        if fixed is not None and list(size) != fixed:
            raise _bad_request(f"image {number} is {size[0]}×{size[1]}, not {fixed[0]}×{fixed[1]}")
        return pixels, size

    def _png(self, mask: NDArray[np.uint8]) -> bytes:
        values = self._facts["classes"]["values"]
        if isinstance(values[0], str):
            table = np.array([[int(value[place : place + 2], 16) for place in (1, 3, 5)] for value in values], np.uint8)
        else:
            table = np.array(values, np.uint8 if max(values) < 256 else np.uint16)
        file = io.BytesIO()
        Image.fromarray(table[mask]).save(file, "PNG")
        return file.getvalue()


def _twice_the_input(width: int, height: int, model: dict[str, Any]) -> tuple[int, int]:
    """What a reduced JPEG needs at least, as distseg's geometry.py and decode.py have it."""
    side = model["image_size"]
    if model["shape"] == "squash":
        return 2 * side, 2 * side
    scale = side / max(width, height)
    across, down = (max(1, math.ceil(length * scale - 0.5)) for length in (width, height))
    return 2 * across, 2 * down


def _bad_request(text: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(text)


set_model(Segmenter())
