"""Files that are either as they were or complete, and files that are read only if they are regular ones.

A file is written aside as `.NAME.HOST.PID.RANDOM.part`, flushed to the disk, and renamed. A kill may leave the part
behind; `remove_parts` takes it away at the next start.
"""

import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from distseg.errors import StorageError, UserError


def write_atomically(path: Path, content: bytes | str, durable: bool = True) -> None:
    """Replace `path` by `content`; a crash at any moment leaves the old file or the new one.

    `durable=False` spares the flush to the disk: for a file that can be made again from others. Raises StorageError.
    """
    with written_atomically(path, durable) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def written_atomically(path: Path, durable: bool = True) -> Iterator[Path]:
    """For writers that need a path: what they write to the yielded one replaces `path` at the end of the block.

    If the block raises, `path` stays as it was. An OSError comes out as StorageError.
    """
    # Writers on several hosts may share the folder, and in containers each of them may be process 1 of its host.
    writer = f"{socket.gethostname()[:16]}.{os.getpid()}.{secrets.token_hex(4)}"  # short: names have at most 255 bytes
    aside = path.with_name(f".{path.name}.{writer}.part")
    try:
        try:
            yield aside
            if durable:
                flush(aside)
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError.of(path, error) from error


@contextmanager
def folder_written_atomically(path: Path) -> Iterator[Path]:
    """For writers of many files: an empty folder of the same name, aside, which becomes `path` at the end of the block.

    If the block raises, nothing is left. Raises UserError where `path` is anything but an empty folder or nothing, and
    StorageError in place of an OSError.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - of `.`, whose name is empty; links stay
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: is there already; choose a new folder, or move it away")
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder that it should be in does not exist; make that first")
    outer = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    aside = outer / path.name
    try:
        try:
            aside.mkdir(parents=True)
            yield aside
            os.sync()  # all of its files at once: one by one takes as long as the writing
            aside.replace(path)
        finally:
            shutil.rmtree(outer, ignore_errors=True)
    except OSError as error:
        raise StorageError.of(path, error) from error


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_parts(folder: Path) -> None:
    """Remove what killed writers left below `folder`. Call it where nobody else writes there: under the run's lock."""
    for part in list(folder.rglob("*.part")):
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading. Raises OSError for any other kind: a pipe would block, a device never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError for another kind, or a longer one."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(f"{path.name} has more than {limit} bytes")
    return content
