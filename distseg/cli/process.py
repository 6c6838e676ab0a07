"""How a command speaks and ends: results on stdout, and one line on stderr for what went wrong."""

import io
import logging
import os
import sys
from collections.abc import Callable
from typing import TextIO

from distseg.errors import UserError
from distseg.text import for_terminal

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def run_command(command: Callable[[], int]) -> int:
    """Run a command to its exit code; what a user can mend is told in one line on stderr.

    2 for a UserError, 1 for a file or a stream that fails, 130 for Ctrl-C.
    """
    set_up_logging()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may hold bytes that no encoding has letters for
            stream.reconfigure(errors="backslashreplace")
    try:
        return command()
    except UserError as error:
        tell_error(error)
        return 2
    except KeyboardInterrupt:
        tell("interrupted")
        return INTERRUPTED
    except OSError as error:
        tell_error(f"{error.filename}: {error.strerror}" if error.filename else error)
        return 1


def tell_error(error: Exception | str) -> None:
    """`error: …` on stderr, in one line whatever the text holds."""
    tell(f"error: {for_terminal(' '.join(str(error).split()))}")


def tell(line: str) -> None:
    """Print a line on stderr; where that cannot be written to, nobody is left to tell."""
    if sys.stderr is None:  # closed by the shell
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _drop(sys.stderr)


def say(text: str) -> None:
    """Print a result on stdout, at once. A reader that has gone, as in `| head -1`, is no error; a full disk is."""
    if sys.stdout is None:  # closed by the shell
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _drop(sys.stdout)
    except OSError as error:
        _drop(sys.stdout)
        raise OSError(f"standard output: {error.strerror}") from None


def say_in_passing(text: str) -> None:
    """`say` for a command whose result is on the disk: that stdout cannot be written to is told, and no failure."""
    try:
        say(text)
    except OSError as error:
        tell(f"warning: {error}")


def set_up_logging() -> None:
    """Progress of the library on stdout as it is; its warnings and errors on stderr after their level."""
    logger = logging.getLogger("distseg")
    if not logger.handlers:
        logger.addHandler(_Terminal())
        logger.setLevel(logging.INFO)
        logger.propagate = False


class _Terminal(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno < logging.WARNING:
            say_in_passing(text)
        else:
            tell(f"{record.levelname.lower()}: {for_terminal(text)}")


def _drop(stream: TextIO) -> None:
    """Send what is still in the buffer, and all that follows, to nowhere: the interpreter flushes again at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
