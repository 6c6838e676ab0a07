"""Foreign text, from file names, tables and other people's runs, made fit for where it is shown."""

import re

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def for_terminal(text: str) -> str:
    """`text` in one line of printable characters; all others, line breaks and escape sequences too, are written out."""
    return "".join(letter if letter.isprintable() else _written_out(letter) for letter in text)


def for_csv(text: str) -> str:
    """`text` for a cell of a table that spreadsheets open: in one line, and no formula (OWASP, CSV injection)."""
    shown = for_terminal(text)
    return f"'{shown}" if text.startswith(_FORMULA_STARTS) else shown


def for_markdown(text: str) -> str:
    """`text` in one line of Markdown that shows it as it is: no link, markup or HTML, and a table's cell stays one."""
    return re.sub(r"([\\`*_\[\]<>|~&:@$])", r"\\\1", for_terminal(text))


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _written_out(letter: str) -> str:
    """As Python writes it, a line break as \\n; bytes that were no UTF-8, kept as surrogates, as \\xNN."""
    code = ord(letter)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else letter.encode("unicode_escape").decode()
