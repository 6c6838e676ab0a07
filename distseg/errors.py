"""What a user can mend."""


class UserError(Exception):
    """Bad configuration or data: one line that names the key or file and the mend. Entry points print it and exit 2."""


class BadFileError(UserError):
    """A file that cannot be used; as ranks read different files, the one that meets it tells."""


class InvalidArgument(UserError, ValueError):
    """A ValueError to those who call the library; in a run, one line that the user can act on."""
