"""The loader on NVIDIA DALI: on a GPU JPEG decoding and all pixel work, on the CPU all that is random.

DALI's CPU decoder cannot decode at a reduced size, which takes less than half as long where originals are large; hence
on the CPU the images come decoded and resized from the reader, as the masks do everywhere. So they do where the reader
keeps them in the GPU's memory, and where they are not squashed, because letterboxes and windows follow from a file's
size, which only the reader knows. Nothing in the pipeline is random: each sample comes with its matrix, its colour map
and its fields (augment.py).
"""

import itertools
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from distseg.data.augment import Transform, warp_elastically
from distseg.data.batch import Batch, Request
from distseg.data.classes import IGNORE
from distseg.data.decode import read_image
from distseg.data.geometry import Frame, cut
from distseg.data.reader import PixelReader, read_ahead

Array = NDArray[Any] | Tensor


class Input(NamedTuple):
    dtype: types.DALIDataType
    dimensions: int
    layout: str | None = None


_INPUTS = {
    "file": Input(types.UINT8, 1),
    "pixels": Input(types.UINT8, 3, "HWC"),
    "kept": Input(types.UINT8, 3, "HWC"),  # pixels that are on the device already
    "masks": Input(types.UINT8, 3, "HWC"),  # the label's, the true one, then each annotator's
    "matrix": Input(types.FLOAT, 2),
    "colour": Input(types.FLOAT, 2),
    "elastic_x": Input(types.FLOAT, 2, "HW"),
    "elastic_y": Input(types.FLOAT, 2, "HW"),
    "hairs": Input(types.FLOAT, 3, "HWC"),
    "blur": Input(types.FLOAT, 0),
    "grain": Input(types.FLOAT, 3, "CHW"),
}


def load_batches(
    requests: Iterator[Sequence[Request]],
    reader: PixelReader,
    max_batch_size: int,
    device: torch.device,
    threads: int,
) -> Generator[Batch, None, None]:
    """One Batch per item of `requests`, in order, made ahead; at most `max_batch_size` samples each.

    `threads` threads read and as many run DALI's operators. Raises BadFileError that names the file where one cannot be
    decoded. Closing the generator frees the pipeline and stops the threads.
    """
    on_gpu = device.type == "cuda"
    squashed = reader.frame.shape == "squash"
    decoding = on_gpu and squashed and reader.cache is None and reader.on_device is None
    ahead = read_ahead(requests, lambda request: _inputs(request, reader, decoding), max_batch_size, threads)
    pending: deque[Sequence[Request]] = deque()  # what DALI has been given and has not returned, oldest first
    first = next(ahead, None)
    if first is None:
        return

    def inputs() -> Iterator[list[dict[str, Array]]]:
        for batch, samples in itertools.chain([first], ahead):
            pending.append(batch)
            yield samples

    try:
        pipeline = _pipeline(
            inputs(),
            tuple(first[1][0]),
            reader.frame,
            on_gpu,
            reader.decoding.orientation == "apply",
            reader.on_device.stream if reader.on_device else None,
            batch_size=max_batch_size,
            num_threads=threads,
            device_id=torch.empty(0, device=device).device.index if on_gpu else None,
            prefetch_queue_depth=2,
        )
        while True:
            # On a stream the outputs are ordered after DALI's work, with no wait on the host.
            stream = torch.cuda.current_stream(device) if on_gpu else None
            try:
                images, masks = pipeline.run(stream)
            except StopIteration:
                return
            except RuntimeError:
                if decoding:
                    _raise_for_bad_file(pending, reader)
                raise
            batch = pending.popleft()
            labels, true, *annotations = _split(masks, device, stream)
            known = batch[0].truth is not None
            corrupted = any(request.label != request.truth for request in batch)
            yield Batch(
                images=_to_torch(images, device, stream),
                masks=labels if corrupted else true,
                true_masks=true if known else None,
                ids=tuple(request.id for request in batch),
                **_of_annotators(batch, annotations, device),
            )
    finally:
        ahead.close()


@pipeline_def
def _pipeline(
    inputs: Iterator[list[dict[str, Array]]],
    names: tuple[str, ...],
    frame: Frame,
    on_gpu: bool,
    turns: bool,
    stream: torch.cuda.Stream | None,
) -> tuple[DataNode, DataNode]:
    given: dict[str, DataNode] = {}
    if "kept" in names:
        inputs, again = itertools.tee(inputs)
        # With no stream named, DALI would ask torch for its current one, also where there is no GPU.
        given = _fed(again, ["kept"], device="gpu" if on_gpu else "cpu", cuda_stream=stream or 0)
    given |= _fed(inputs, [name for name in names if name != "kept"])

    def moved(name: str) -> DataNode:
        return given[name].gpu() if on_gpu else given[name]

    def warped(pixels: DataNode, interpolation: types.DALIInterpType, fill: int = 0) -> DataNode:
        return fn.warp_affine(pixels, matrix=given["matrix"], interp_type=interpolation, fill_value=fill)

    if "file" in given:
        image = fn.decoders.image(
            fn.io.file.read(given["file"]),
            device="mixed",
            output_type=types.RGB,
            adjust_orientation=turns,
            jpeg_fancy_upsampling=True,  # as the CPU decodes
        )
        image = fn.resize(image, size=(frame.size, frame.size), interp_type=types.INTERP_LINEAR, antialias=True)
    else:
        image = given["kept"] if "kept" in given else moved("pixels")
    # DALI fills with one value for all channels: that of padding is 0 while the pixels are relative to it.
    coloured = any(frame.image_fill)
    fill = (
        types.Constant(np.array(frame.image_fill, np.float32), device="gpu" if on_gpu else "cpu") if coloured else None
    )
    if fill is not None:
        image = image - fill
    if "elastic_x" in given:
        image = fn.experimental.remap(image, moved("elastic_x"), moved("elastic_y"), pixel_origin="center")
    image = warped(image, types.INTERP_LINEAR)
    if fill is not None:
        image = image + fill
    if "hairs" in given:
        image = image * moved("hairs")
    if "blur" in given:
        image = fn.gaussian_blur(image, sigma=given["blur"], dtype=types.FLOAT)
    image = fn.transpose(fn.coord_transform(image, MT=given["colour"]), perm=[2, 0, 1])
    if "grain" in given:
        image = image + moved("grain")
    return image, warped(moved("masks"), types.INTERP_NN, frame.mask_fill)


def _fed(inputs: Iterator[list[dict[str, Array]]], names: list[str], **where: Any) -> dict[str, DataNode]:
    """What each batch's samples hold under `names`, as nodes of the pipeline."""
    kinds = [_INPUTS[name] for name in names]
    nodes = fn.external_source(
        (tuple([sample[name] for sample in samples] for name in names) for samples in inputs),
        num_outputs=len(names),
        batch=True,
        cycle=None,
        dtype=[kind.dtype for kind in kinds],
        ndim=[kind.dimensions for kind in kinds],
        layout=[kind.layout or "" for kind in kinds],
        **where,
    )
    return dict(zip(names, nodes, strict=True))


def _inputs(request: Request, reader: PixelReader, decoding: bool) -> dict[str, Array]:
    """The arrays of one sample under their names in `_INPUTS`; with `decoding`, DALI does the image's file."""
    transform, frame = request.transform, reader.frame
    label = reader.mask(request.label)
    true = label if request.truth in (None, request.label) else reader.mask(request.truth)
    drawn = [reader.mask(path) for path in request.annotations or ()]
    planes = [cut(mask, request.window, frame.size) for mask in (label, true, *drawn)]
    if transform.elastic is not None:
        fill = (frame.mask_fill,)
        planes = [warp_elastically(plane, transform.elastic, cv2.INTER_NEAREST, fill) for plane in planes]
    lacking = len(request.annotators) - len(drawn)
    masks = np.stack([*planes, *lacking * [np.full_like(planes[0], IGNORE)]], axis=-1)
    image: dict[str, Array]
    if decoding:
        reader.check_unchanged(request.image)
        image = {"file": np.frombuffer(os.fsencode(request.image), np.uint8)}
    elif reader.on_device:
        image = {"kept": reader.on_device.image(request.image)}
    else:
        pixels = cut(reader.image(request.image), request.window, frame.size)
        if transform.elastic is not None:
            pixels = warp_elastically(pixels, transform.elastic, cv2.INTER_LINEAR, frame.image_fill)
        image = {"pixels": pixels}
    if transform.elastic is not None and "pixels" not in image:
        image |= _source_maps(transform.elastic)
    return image | {"masks": masks, "matrix": transform.matrix, "colour": transform.colour} | _fields(transform)


def _fields(transform: Transform) -> dict[str, Array]:
    fields: dict[str, Array] = {}
    if transform.hairs is not None:
        fields["hairs"] = transform.hairs[..., None]
    if transform.blur is not None:
        fields["blur"] = np.array(max(transform.blur, np.float32(1e-3)))  # DALI refuses 0; this hands pixels through
    if transform.grain is not None:
        fields["grain"] = transform.grain
    return fields


def _source_maps(field: NDArray[np.float32]) -> dict[str, Array]:
    row, column = np.mgrid[: len(field), : len(field)].astype(np.float32)
    return {"elastic_x": column + field[..., 0], "elastic_y": row + field[..., 1]}


def _to_torch(output: Any, device: torch.device, stream: torch.cuda.Stream | None) -> Tensor:
    # Copied, because DALI reuses its buffers for the batches that follow.
    dense = output.as_tensor()
    dtype = torch.float32 if dense.dtype == types.FLOAT else torch.uint8
    return feed_ndarray(dense, torch.empty(dense.shape(), dtype=dtype, device=device), cuda_stream=stream)


def _split(masks: Any, device: torch.device, stream: torch.cuda.Stream | None) -> list[Tensor]:
    """(B, H, W) of each plane of "masks"."""
    if stream is not None:
        return list(_to_torch(masks, device, stream).permute(3, 0, 1, 2).contiguous())
    # By numpy, because torch's operators would start a team of OpenMP threads for this thread (torch_loader.py).
    return [torch.from_numpy(plane.copy()) for plane in np.moveaxis(np.asarray(masks.as_tensor()), -1, 0)]


def _of_annotators(batch: Sequence[Request], planes: list[Tensor], device: torch.device) -> dict[str, Tensor]:
    """`Batch.annotations` and `annotators`; none where they are not wanted."""
    if batch[0].annotations is None:
        return {}
    places = np.array([request.annotators for request in batch], np.int64)
    if device.type == "cuda":
        annotators = torch.from_numpy(places).pin_memory().to(device, non_blocking=True)
        stacked = torch.stack(planes, 1)
        # Warping has filled what it brought in from outside of the frame, here too.
        return {
            "annotations": stacked.masked_fill_((annotators < 0)[:, :, None, None], IGNORE),
            "annotators": annotators,
        }
    pixels = np.stack([plane.numpy() for plane in planes], axis=1)
    pixels[places < 0] = IGNORE
    return {"annotations": torch.from_numpy(pixels), "annotators": torch.from_numpy(places)}


def _raise_for_bad_file(pending: Sequence[Sequence[Request]], reader: PixelReader) -> None:
    """DALI's error does not say which file it met; read those in flight one by one."""
    for path in {request.image: None for batch in pending for request in batch}:
        read_image(path, reader.decoding)
