import csv
import io

import pytest

from distseg.text import counted, for_csv, for_markdown, for_terminal


@pytest.mark.parametrize(
    ("foreign", "shown"),
    [
        ("Läsion 1 (Kopie).jpg", "Läsion 1 (Kopie).jpg"),
        ("two\nlines\r\n", r"two\nlines\r\n"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("a\u202eb", r"a\u202eb"),  # right to left from here
        (b"l\xe4sion".decode(errors="surrogateescape"), r"l\xe4sion"),
        ("\ud800", r"\ud800"),
        ("tab\t\0", r"tab\t\x00"),
    ],
)
def test_text_for_a_terminal_is_one_printable_line(foreign, shown):
    assert for_terminal(foreign) == shown
    assert for_terminal(foreign).encode() and for_terminal(foreign).isprintable()


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r="])
def test_a_cell_is_no_formula(start):
    foreign = f'{start}HYPERLINK("http://x","y")'
    file = io.StringIO()
    csv.writer(file).writerow([for_csv(foreign), "next"])
    [[cell, following]] = csv.reader(io.StringIO(file.getvalue()))
    assert cell.startswith("'") and following == "next"
    assert cell[1:].replace("\\t", "\t").replace("\\r", "\r") == foreign


def test_other_cells_stay_as_they_are():
    assert for_csv("ISIC_0000001 = x, -1") == "ISIC_0000001 = x, -1"


def test_text_in_markdown_is_no_markup():
    assert for_markdown("<b>a_b|c</b> [x](http://y) `d`, *e* 1.5") == (
        r"\<b\>a\_b\|c\</b\> \[x\](http\://y) \`d\`, \*e\* 1.5"
    )
    assert for_markdown("two\nlines") == r"two\\nlines"


def test_numbers_and_their_nouns():
    assert [counted(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
