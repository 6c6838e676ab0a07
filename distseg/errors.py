"""What a user can mend."""

import errno
from pathlib import Path
from typing import Self


class UserError(Exception):
    """Bad configuration or data: one line that names the key or file and the mend. Entry points print it and exit 2."""


class BadFileError(UserError):
    """A file that cannot be used; as ranks read different files, the one that meets it tells."""


class InvalidArgument(UserError, ValueError):
    """A ValueError to those who call the library; in a run, one line that the user can act on."""


_MENDS = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or ask for a larger quota",
    errno.EACCES: "let this user write there",
    errno.EPERM: "let this user write there",
    errno.EROFS: "choose a folder that can be written to",
    errno.ENOENT: "its folder is missing; was it removed or renamed?",
    errno.ENOTDIR: "a part of its path is a file and not a folder; choose another",
    errno.EISDIR: "a folder has its name; move that away",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class StorageError(OSError):
    """A file that cannot be written: one line that names it, the cause and the mend.

    Nothing is wrong with config or data, so entry points print it and exit 1; the run can be resumed.
    """

    @classmethod
    def of(cls, path: Path, cause: OSError) -> Self:
        """That `path` cannot be written, because of `cause`."""
        if isinstance(cause, cls):
            return cause
        mend = _MENDS.get(cause.errno or 0, "see that the disk works")
        error = cls(f"{path}: cannot be written ({cause.strerror or cause}); {mend}")
        error.errno = cause.errno
        return error
