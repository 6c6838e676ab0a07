"""The files in a zip archive, or in the folder that it was unpacked to, by their names. Nothing is unpacked."""

import zipfile
from collections.abc import Callable
from pathlib import Path

from distseg.data.sample import leaves_root
from distseg.errors import BadFileError
from distseg.files import read_regular
from distseg.text import for_terminal

_MOST_MEMBERS = 2_000_000
_ENCRYPTED = 1


class Archive:
    """Raises BadFileError, one line, for what is no archive, and for members that are not to be trusted."""

    def __init__(self, path: Path, limit: int) -> None:
        self._path = path
        self._limit = limit
        if path.is_dir():
            self.names = {self._inside(file) for file in path.rglob("*") if file.is_file()}
            self._read: Callable[[str], bytes] = lambda name: read_regular(path / name, limit)
            return
        if not path.is_file():
            raise BadFileError(f"{path}: no such file")
        try:
            self._zip = zipfile.ZipFile(path)
        except Exception as error:  # BadZipFile, OSError, NotImplementedError, struct.error, UnicodeDecodeError, …
            text = " ".join(str(error).split()) or type(error).__name__
            raise BadFileError(f"{path}: cannot be read as a zip archive: {text}; export it again") from None
        members = [member for member in self._zip.infolist() if not member.filename.endswith("/")]
        self._check(members)
        self._members = {member.filename: member for member in members}
        self.names = set(self._members)
        self._read = self._inflated

    def read(self, name: str) -> bytes:
        """The content of a file in the archive."""
        try:
            return self._read(name)
        except BadFileError:
            raise
        except Exception as error:  # zlib, CRC, truncation, compression that Python has not
            text = " ".join(str(error).split()) or type(error).__name__
            raise BadFileError(f"{self.place(name)}: cannot be read: {text}; export the archive again") from None

    def text(self, name: str) -> str:
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadFileError(f"{self.place(name)}: is no UTF-8: {error}; export the archive again") from None

    def place(self, name: str) -> str:
        """Where a file is, for errors."""
        return for_terminal(f"{self._path}: {name}")

    def _inside(self, file: Path) -> str:
        name = file.relative_to(self._path).as_posix()
        if not file.resolve().is_relative_to(self._path.resolve()):
            raise BadFileError(f"{self.place(name)}: a link that leads out of the folder; put the file itself there")
        return name

    def _inflated(self, name: str) -> bytes:
        with self._zip.open(self._members[name]) as file:
            return file.read(self._limit)

    def _check(self, members: list[zipfile.ZipInfo]) -> None:
        if len(members) > _MOST_MEMBERS:
            raise BadFileError(f"{self._path}: has {len(members):,} members, above {_MOST_MEMBERS:,}; split it")
        seen = set()
        for member in members:
            name = member.filename
            if leaves_root(name) or not name:
                raise BadFileError(f"{self.place(name)}: leaves the archive; do not trust it, export it again")
            if member.flag_bits & _ENCRYPTED:
                raise BadFileError(f"{self.place(name)}: is encrypted; export the archive without a password")
            if member.file_size > self._limit:
                raise BadFileError(
                    f"{self.place(name)}: would unpack to {member.file_size:,} bytes, above data.max_file_bytes "
                    f"({self._limit:,}): a zip bomb? export the archive again"
                )
            if name in seen:
                raise BadFileError(f"{self.place(name)}: is twice in the archive; export it again")
            seen.add(name)
