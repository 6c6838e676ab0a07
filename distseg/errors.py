"""The one exception that a user can mend."""


class UserError(Exception):
    """Bad configuration or data: one line that names the key or file and the mend. Entry points print it and exit 2."""
