"""Pixels at network resolution, read ahead of the loaders and kept in memory where they fit.

Resizing comes before anything random, so its result can be kept: from the second epoch on nothing is decoded. Decoded
now, kept in memory or read from a cache on disk, the bits are the same, so that order and resume stay as they are.
"""

import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from distseg.data.cache import PixelCache
from distseg.data.decode import PLAIN, Decoding, read_resized_image, read_resized_mask
from distseg.data.device_images import DeviceImages
from distseg.data.geometry import Frame
from distseg.errors import BadFileError

Request = TypeVar("Request")
Work = TypeVar("Work")

_PREFETCHED_BATCHES = 2
_Ready = queue.Queue[tuple[Work] | BaseException | None]
"""An item in a tuple, an error, or None at the end."""


class PixelReader:
    """Reads images and masks, each as the canvas of `frame`; several threads may ask at once."""

    def __init__(
        self,
        frame: Frame,
        memory_bytes: int = 0,
        cache: PixelCache | None = None,
        on_device: DeviceImages | None = None,
        decoding: Decoding = PLAIN,
    ) -> None:
        """`memory_bytes` bounds the pixels kept; what no longer fits is decoded anew each time."""
        self.frame = frame
        self.cache = cache
        self.on_device = on_device
        """Where a loader that works on a GPU finds the images instead, if they fit there."""
        self.decoding = decoding
        self.kept_bytes = 0
        self._memory_bytes = memory_bytes
        self._kept: dict[tuple[str, Path], NDArray[np.uint8]] = {}
        self._stamps: dict[Path, tuple[int, int, int]] = {}
        self._lock = threading.Lock()

    def image(self, path: Path) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB, not to be written to. Raises BadFileError."""
        return self._read("image", path, read_resized_image)

    def mask(self, path: Path) -> NDArray[np.uint8]:
        """(H, W) uint8 class ids, 255 = ignore or padding, not to be written to. Raises BadFileError."""
        return self._read("mask", path, read_resized_mask)

    def check_unchanged(self, path: Path) -> None:
        """Raises BadFileError where the file is another one than at the first call of this run."""
        try:
            status = path.stat()
        except OSError:
            return  # what is wrong with it is for decoding to say
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._stamps.setdefault(path, stamp) != stamp:
            raise BadFileError(f"{path}: has changed since this run first read it; put the old file back and resume")

    def _read(
        self, kind: str, path: Path, decode: Callable[[Path, Frame, Decoding], NDArray[np.uint8]]
    ) -> NDArray[np.uint8]:
        cached = self.cache.find(path) if self.cache else None
        if cached is not None:
            return cached
        kept = self._kept.get((kind, path))
        if kept is not None:
            return kept
        self.check_unchanged(path)
        pixels = decode(path, self.frame, self.decoding)
        pixels.setflags(write=False)
        with self._lock:
            if (kind, path) not in self._kept and self.kept_bytes + pixels.nbytes <= self._memory_bytes:
                self._kept[kind, path] = pixels
                self.kept_bytes += pixels.nbytes
        return pixels


def read_ahead(
    requests: Iterator[Sequence[Request]], work: Callable[[Request], Work], max_batch_size: int, threads: int
) -> Generator[tuple[Sequence[Request], list[Work]], None, None]:
    """Each batch of `requests` with `work` done on its items by `threads` threads, in order, two batches ahead.

    What `work` raises comes out at its batch. Closing the generator stops the threads.

    A thread takes its part of a batch at once: where files are small, waking one for every item, and the caller for
    every result, takes longer than the work.
    """
    pending: deque[tuple[Sequence[Request], list[Future[list[Work]]]]] = deque()

    def work_on(part: Sequence[Request]) -> list[Work]:
        return [work(request) for request in part]

    with ThreadPoolExecutor(threads, thread_name_prefix="distseg-read") as pool:
        try:
            while True:
                while len(pending) <= _PREFETCHED_BATCHES and (batch := next(requests, None)) is not None:
                    if len(batch) > max_batch_size:
                        raise ValueError(f"a batch of {len(batch)} where at most {max_batch_size} were announced")
                    size = max(1, math.ceil(len(batch) / threads))
                    parts = [batch[first : first + size] for first in range(0, len(batch), size)]
                    pending.append((batch, [pool.submit(work_on, part) for part in parts]))
                if not pending:
                    return
                batch, futures = pending.popleft()
                yield batch, [item for future in futures for item in future.result()]
        finally:
            pool.shutdown(cancel_futures=True)


def taken_by_a_thread(items: Generator[Work, None, None]) -> Generator[Work, None, None]:
    """`items`, a generator, taken one ahead by a thread of its own, so that nobody waits while an item is put together.

    What it raises comes out at its place. Closing this generator closes the other and stops the thread; so does the end
    of the program, which waits for it: a thread that met a dying interpreter in the middle of an operator would abort.
    """
    ready: _Ready[Work] = queue.Queue(maxsize=1)
    stopped = threading.Event()
    thread = threading.Thread(target=_take, args=(items, ready, stopped), name="distseg-batches")
    thread.start()
    try:
        while True:
            value = ready.get()
            if value is None:
                return
            if isinstance(value, BaseException):
                raise value
            yield value[0]
    finally:
        stopped.set()
        if threading.current_thread() is not thread:  # which may be the one that collects what nobody closed
            thread.join()


def _take(items: Generator[Work, None, None], ready: _Ready[Work], stopped: threading.Event) -> None:
    """The thread: put `items` into `ready` until they end or nobody wants them."""
    try:
        for item in items:
            _put((item,), ready, stopped)
            if not _wanted(stopped):
                return
        _put(None, ready, stopped)
    except BaseException as error:
        _put(error, ready, stopped)
    finally:
        items.close()


def _put(value: tuple[Work] | BaseException | None, ready: _Ready[Work], stopped: threading.Event) -> None:
    while _wanted(stopped):
        try:
            ready.put(value, timeout=0.1)
            break
        except queue.Full:
            continue


def _wanted(stopped: threading.Event) -> bool:
    return not stopped.is_set() and threading.main_thread().is_alive()
