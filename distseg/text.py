"""Foreign text, made fit for the place where it is shown."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A cell of a spreadsheet that begins with one of these is calculated, not shown."""


def for_terminal(text: str) -> str:
    """`text` on one line, with every character that a terminal would obey, or cannot show, as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def for_csv(text: str) -> str:
    """`text` as a cell of a table that a spreadsheet shows and does not calculate."""
    return f"'{text}" if text.startswith(_FORMULA) else text
