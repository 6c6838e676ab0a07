"""From samples to batches: which samples, in which order, under which augmentation; decoding is a loader's work."""

import itertools
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from distseg.data import torch_loader
from distseg.data.annotators import Annotators, vote
from distseg.data.augment import draw_transform, identity_transform
from distseg.data.batch import Batch, Labels, Request
from distseg.data.cache import open_cache
from distseg.data.config import DataConfig
from distseg.data.device_images import DeviceImages, fit_on_device
from distseg.data.reader import PixelReader, taken_by_a_thread
from distseg.data.sample import Sample
from distseg.data.seeding import generator
from distseg.distributed.ranks import ShardSpec
from distseg.errors import UserError
from distseg.text import for_terminal


class Stream:
    """An endless stream of training batches in a global order that every rank can compute.

    `waited` counts the seconds that callers of `batch` have waited for one.

    Epoch e is a permutation of the samples that depends on (seed, name, e) alone; batches straddle epochs, so each
    sample comes exactly once per epoch whatever the batch size. Nothing has to be saved to resume.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        labels: Labels,
        name: str,
        config: DataConfig,
        seed: int,
        shard: ShardSpec,
        batch_size: int,
        accumulation: int,
        device: torch.device,
        annotators: Annotators | None = None,
    ) -> None:
        """`batch_size` is per rank and micro-batch; with `annotators`, batches have all annotations,
        and the noisy stream's masks are their vote at the network's resolution.

        Raises UserError where there are no samples or no such loader.
        """
        if not samples:
            raise UserError(f"the {name} stream has no images: data.clean_count divides the training split; change it")
        unknown = [sample.id for sample in samples if sample.reference is None]
        if labels == "true" and unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise UserError(
                f"the {name} stream learns from references, and {for_terminal(unknown[0])} has none{more}; choose "
                "another method"
            )
        self._truth_known = not unknown
        self._samples = samples
        self._labels = labels
        self._name = name
        self._config = config
        self._seed = seed
        self._shard = shard
        self._batch_size = batch_size
        self._accumulation = accumulation
        self._device = device
        self._annotators = annotators
        self._load_batches = _find_loader(config.pipeline)
        cache = open_cache(config)
        on_device = None
        if fit_on_device(samples, config, device):
            on_device = DeviceImages(PixelReader(config.frame, cache=cache, decoding=config.decoding).image, device)
        self._reader = PixelReader(config.frame, int(config.memory * 2**30), cache, on_device, config.decoding)
        self._batches: Generator[Batch, None, None] | None = None
        self.waited = 0.0
        self._next_index = 0

    def batch(self, step: int, micro: int) -> Batch:
        """This rank's `micro`-th batch of `step`: prefetched when asked for in turn, the same bits in any order."""
        started = time.perf_counter()
        index = step * self._accumulation + micro
        if self._batches is None or index != self._next_index:
            self.close()
            batches = self._load_batches(
                map(self._requests, itertools.count(index)),
                self._reader,
                self._batch_size,
                self._device,
                self._config.threads,
            )
            # On a GPU the loader queues its work on the caller's CUDA stream, which another thread does not have.
            self._batches = taken_by_a_thread(batches) if self._device.type == "cpu" else batches
        batch = next(self._batches)
        if batch.annotations is not None and self._labels == "noisy":
            batch = replace(batch, masks=vote(batch.annotations, self._config.class_count))
        self._next_index = index + 1
        self.waited += time.perf_counter() - started
        return batch

    def close(self) -> None:
        """Stop prefetching and free the loader; a later `batch` opens it again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _requests(self, index: int) -> list[Request]:
        step, micro = divmod(index, self._accumulation)
        positions = self._shard.micro_batch(step, micro, self._accumulation, self._batch_size)
        return [self._request(position) for position in positions]

    def _request(self, position: int) -> Request:
        epoch, offset = divmod(position, len(self._samples))
        order = _epoch_order(self._seed, self._name, epoch, len(self._samples))
        config = self._config
        transform = draw_transform(config.augment, config.image_size, self._seed, self._name, position)
        sample = self._samples[order[offset]]
        annotation = 0
        if len(sample.annotations) > 1 and self._annotators is None:
            rng = generator(self._seed, "annotator", self._name, position)
            annotation = int(rng.integers(len(sample.annotations)))
        window = None
        if config.shape == "crop":
            row, column = generator(self._seed, "window", self._name, position).random(2)
            window = float(row), float(column)
        return Request.of(sample, self._labels, transform, annotation, self._truth_known, window, self._annotators)


def evaluation_batches(
    samples: Sequence[Sample],
    config: DataConfig,
    shard: ShardSpec,
    batch_size: int,
    device: torch.device,
    windows: bool = False,
) -> Generator[Batch, None, None]:
    """This rank's share of `samples`, each once, in the order given, with true masks and no augmentation.

    Of shape crop they are whole canvases, larger than the network's input and of several sizes: `batch_size` is 1 then,
    or else `windows` asks for the middle of each, image_size².
    """
    transform = identity_transform(config.image_size)
    window = (0.5, 0.5) if windows and config.shape == "crop" else None
    requests = (
        [Request.of(samples[index], "true", transform, window=window) for index in indices]
        for indices in shard.evaluation_batches(len(samples), batch_size)
    )
    reader = PixelReader(config.frame, cache=open_cache(config), decoding=config.decoding)
    return _find_loader(config.pipeline)(requests, reader, batch_size, device, config.threads)


@lru_cache(maxsize=8)
def _epoch_order(seed: int, name: str, epoch: int, count: int) -> NDArray[np.int64]:
    return generator(seed, "order", name, epoch).permutation(count)


def _find_loader(pipeline: str) -> Callable[..., Generator[Batch, None, None]]:
    if pipeline in ("auto", "dali"):
        try:
            from distseg.data import dali  # heavy and optional
        except ImportError as error:
            if pipeline == "dali":
                raise UserError(
                    f"data.pipeline dali: DALI does not import ({error}); pip install 'nvidia-dali-cuda130>=2.4,<3', "
                    "or set data.pipeline=torch"
                ) from None
        else:
            return dali.load_batches
    return torch_loader.load_batches
