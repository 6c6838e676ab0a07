"""Two-dimensional slices of NIfTI. The only importer of nibabel."""

import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distseg.data.decode import Decoding, content_of
from distseg.errors import BadFileError, UserError


def read_slice(path: Path, decoding: Decoding) -> NDArray[Any]:
    """(H, W) of the file's own type: rows are its second axis, as SimpleITK and nnU-Net have it.

    Raises BadFileError for a volume of several slices, and for what is no NIfTI file or larger than the bounds.
    """
    nibabel = _nibabel()
    content = content_of(path, decoding)
    most = decoding.max_file_bytes
    try:
        if content.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
                content = file.read(most + 1)
        if len(content) > most:
            raise BadFileError(f"{path}: unpacks to more than data.max_file_bytes ({most:,}); is it a slice?")
        image = nibabel.Nifti1Image.from_bytes(content)
        shape = image.header.get_data_shape()
        if len(shape) < 2 or min(shape) < 1 or any(side != 1 for side in shape[2:]):
            raise BadFileError(f"{path}: is a volume of {shape}; save its slices as files of their own")
        if shape[0] * shape[1] > decoding.max_pixels:
            raise BadFileError(f"{path}: has {shape[0]}×{shape[1]} pixels, above data.max_pixels; reduce it")
        return np.asanyarray(image.dataobj).reshape(shape[:2]).T
    except BadFileError:
        raise
    except Exception as error:  # nibabel raises ImageFileError, ValueError, HeaderDataError, OSError and more
        text = " ".join(str(error).split()) or type(error).__name__
        raise BadFileError(f"{path}: cannot be read as NIfTI: {text[:200]}; save it again") from None


def _nibabel() -> Any:
    try:
        import nibabel
    except ImportError:
        raise UserError(
            "NIfTI needs nibabel, which is not installed: pip install nibabel, or save the slices as PNG"
        ) from None
    return nibabel
