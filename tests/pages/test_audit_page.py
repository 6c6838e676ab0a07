"""The page of an audit: foreign text is text, nothing is loaded, empty parts are left out; and its pictures."""

import re

import numpy as np
import pytest

from distseg.pages.html import AuditCard, AuditPage, Fact, LegendEntry, NamedProblem, Picture, Row, Table, audit_page
from distseg.pages.thumbnails import shaded

HOSTILE = "<script>alert('1')</script>\n=HYPERLINK(\"http://evil\")<img src=x onerror=alert(2)>"


def page_of(text: str) -> AuditPage:
    table = Table(text, [text], [Row([text])])
    return AuditPage(
        text, [text], [Fact(text, text)], text, table, [LegendEntry(text, "#112233")], text,
        [AuditCard(text, [text], [b"jpeg"])], [Picture(text, text, b"png")], table, [NamedProblem(text, text)],
    )  # fmt: skip


def test_foreign_text_is_shown_as_text() -> None:
    html = audit_page(page_of(HOSTILE))
    assert html.count("&lt;script&gt;") == 20
    tags = re.findall(r"<(\w+)", html)
    assert "script" not in tags and tags.count("img") == 2


def test_nothing_is_loaded() -> None:
    sources = re.findall(r"(?:src|href)=\"([^\"]*)\"", audit_page(page_of("plain")))
    assert sources and all(source.startswith("data:image/") for source in sources)


def test_an_audit_of_nothing_has_a_page() -> None:
    none = Table("", [], [])
    html = audit_page(AuditPage("title", [], [], "", none, [], "", [], [], none, []))
    assert "<h1>title</h1>" in html and "<h2>" not in html


@pytest.mark.parametrize(("height", "width"), [(30, 60), (60, 30), (500, 500)])
def test_what_is_probably_wrong_is_red_and_the_rest_grey(height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    values = np.zeros((8, 8), np.float32)
    values[:, 4:] = 1
    shown = shaded(image, values, 100)
    assert max(shown.shape) == 100 and shown.dtype == np.uint8
    left, right = shown[:, : shown.shape[1] // 4].astype(int), shown[:, -shown.shape[1] // 4 :].astype(int)
    assert (left == left[..., :1]).all()
    assert (right[..., 0] > right[..., 1] + 100).all()
