"""Graphs as ONNX: written, and run. Needs the extra `export`.

The only importer of onnxruntime but for what MLflow serves (tracking/served_model.py), which has a process of its own.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from distseg.errors import UserError
from distseg.files import write_atomically

_NEEDED = "needs onnx, onnxscript and onnxruntime; install them with pip install 'distseg[export]'"


def write_onnx(
    program: Any, path: Path, names: tuple[Sequence[str], Sequence[str]], axes: Mapping[int, str], facts: str
) -> None:
    """Write an exported program as one file. Raises UserError where an operator has no form in ONNX.

    `names` are those of inputs and outputs, `axes` those of the free axes of the first input, and `facts` becomes the
    file's metadata `distseg`.
    """
    _runtime()
    try:
        with quiet("torch.onnx"):
            onnx = torch.onnx.export(
                program,
                (),
                input_names=names[0],
                output_names=names[1],
                dynamic_shapes=(dict(axes), None)[: len(names[0])],
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        assert onnx is not None
        onnx.model.metadata_props["distseg"] = facts
        content = onnx.model_proto.SerializeToString()
    except ImportError:
        raise UserError(f"ONNX: {_NEEDED}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"ONNX: the network cannot be written: {reason}; export it with --program alone") from None
    write_atomically(path, content)


class OnnxGraph:
    """A graph in onnxruntime on the CPU. Calls are as those of the module that it was made of, on arrays."""

    def __init__(self, path: Path) -> None:
        self._session = _runtime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._inputs = [each.name for each in self._session.get_inputs()]

    def __call__(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        outputs: list[NDArray[Any]] = self._session.run(None, dict(zip(self._inputs, inputs, strict=True)))
        return outputs


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"ONNX: {_NEEDED}") from None
    return onnxruntime


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Exporters warn, in many lines, of packages that they would support and of symbols that they have resolved."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
