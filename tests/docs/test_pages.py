"""What the pages name is there: files, keys of a config, targets of make, and every page in the site's menu."""

import pydoc
import re
from pathlib import Path

import pytest
import yaml

from distseg.config.reference import groups

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()}
ROOMS = {path.name for path in (ROOT / "distseg").iterdir() if path.is_dir()}
MADE = {"site", "demo", "runs", "build"}
"""Folders that commands make."""
KEYS = {key.name for group in groups() for key in group.keys}
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def quoted(page: Path) -> set[str]:
    """What stands in backticks on one line."""
    return set(re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")))


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    """`distseg/…` from the root, or `meta/…` within the package."""
    names = {name for name in quoted(page) if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", name) and "/" in name}
    roots = {name: ROOT / "distseg" for name in names if name.split("/")[0] in ROOMS - MADE}
    roots |= {name: ROOT for name in names if name.split("/")[0] in FOLDERS - MADE}
    missing = [name for name, root in roots.items() if not (root / name).exists()]
    assert not missing


@every_page
def test_keys_that_are_named_exist(page: Path) -> None:
    pattern = rf"((?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+)(?:=.*)?"
    named = {match[1] for text in quoted(page) if (match := re.fullmatch(pattern, text))}
    files = {name for name in named if name.endswith((".py", ".md", ".yaml", ".json", ".onnx", ".pt2"))}
    # A method's key may be written without its part: method.q for method.loss.q.
    known = KEYS | {re.sub(r"^method\.\w+\.", "method.", key) for key in KEYS}
    unknown = {name for name in named - files if not any(key == name or key.startswith(f"{name}.") for key in known)}
    assert not unknown


@every_page
def test_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {text.removeprefix("make ") for text in quoted(page) if re.fullmatch(r"make [a-z-]+", text)}
    assert named <= targets


def test_every_page_is_in_the_menu() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed: set[str] = set()
    for entry in menu:
        listed |= {entry} if isinstance(entry, str) else {page for pages in entry.values() for page in pages}
    assert listed == {path.name for path in ROOT.glob("docs/*.md")}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_map_has_every_room() -> None:
    rooms = {path.parent.name for path in (ROOT / "distseg").glob("*/__init__.py")}
    assert {f"distseg/{room}/" for room in rooms} <= quoted(ROOT / "docs" / "design.md")


def test_what_the_api_page_documents_can_be_imported() -> None:
    names = re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    missing = [name for name in names if pydoc.locate(name) is None]
    assert len(names) > 5 and not missing
