"""One process at a time in a run folder."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distseg.errors import StorageError, UserError
from distseg.files import read_regular, remove_parts
from distseg.run_folder import RunFolder

logger = logging.getLogger(__name__)

TRAINS = "trains this run now; wait for its end, stop it with SIGTERM, or choose another name="
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def run_lock(folder: Path, doing: str = TRAINS) -> Iterator[None]:
    """Hold the run in `folder`, which is made if it is missing, and remove what killed starts left half-written.

    Call it on rank 0, before anything is written; if nothing is, the folder goes again. `doing` is what another process
    that holds it does, with the mend. Raises UserError, with that, host and process, where there is one; StorageError
    where the folder cannot be written.

    The kernel drops the lock when the process ends, however it ends. Between hosts it holds on file systems that have
    locks: NFS 4 and Lustre mounted with `flock` do. On one that has none a warning says so and the run goes on; two
    starts of one run then are the user's to avoid.
    """
    path = RunFolder(folder).lock
    try:
        made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    except OSError as error:
        raise StorageError.of(path, error) from error
    descriptor = _open_and_take(folder, doing)
    try:
        try:
            remove_parts(folder)
            holder = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        except OSError as error:
            raise StorageError.of(path, error) from error
        yield
    finally:
        if folder in made and folder.is_dir() and [*folder.iterdir()] == [path]:
            _remove(path, made)
        os.close(descriptor)


def _open_and_take(folder: Path, doing: str) -> int:
    """The open file that holds the lock."""
    path = RunFolder(folder).lock
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise StorageError.of(path, error) from error
        try:
            _take(descriptor, folder, doing)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # a start that failed has removed the file in between


def _remove(path: Path, made: list[Path]) -> None:
    """After a start that has written nothing: the lock's file, and the folders that were made for it."""
    with suppress(OSError):
        path.unlink()
        for folder in made:
            folder.rmdir()


def _take(descriptor: int, folder: Path, doing: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(folder)
        if error.errno in _HELD:
            raise UserError(f"{folder}: {holder} {doing}") from None
        if error.errno not in _NO_LOCKS:
            raise StorageError.of(RunFolder(folder).lock, error) from error
        logger.warning(
            "%s: this file system has no locks (%s); make sure that %s does not work on it any more",
            folder,
            error.strerror,
            holder,
        )


def _holder(folder: Path) -> str:
    try:
        holder = json.loads(read_regular(RunFolder(folder).lock, 1000))
        return f"process {int(holder['process'])} on {str(holder['host'])[:100]!r} (since {str(holder['since'])[:30]})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
