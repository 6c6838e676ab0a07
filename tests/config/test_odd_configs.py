"""Odd values of every key and damaged files: a config that works, or one line that names the key."""

import random
from pathlib import Path

import pytest

from distseg.config.load import dump_config, load_config
from distseg.config.reference import groups
from distseg.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
KEYS = sorted({key.name for group in groups() for key in group.keys})
WORDS = (
    "null true [] {} [[]] -1 0 1e309 nan -.inf 1e-400 0x1F ../../.. ~ ${seed} ${ ${oc.env:HOME} ' \" : os:system 1:2:3"
)
ODD = [
    *WORDS.split(),
    *("", "{a: {b: c}}", "[1, null]", "&a [*a]", "!!python/object:os.system x", "\x1b[31mred", "a\nb", "é\u202e"),
    *("9" * 400, "x" * 5000),
]
"""What hands, scripts and spreadsheets have put in the place of a value."""


def said(act) -> str | None:
    """The refusal in one printable line, or None; any other exception fails the test."""
    try:
        act()
    except UserError as error:
        assert str(error).isprintable(), repr(str(error))
        return str(error)
    return None


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("name: odd\ndata: {root: data, image_size: 64, clean_count: 2}\ntrain: {steps: 4, batch_size: 2}\n")
    return path


@pytest.mark.parametrize("of", [12, pytest.param(1, marks=pytest.mark.faults)])
def test_an_odd_value_of_any_key_is_taken_or_named(base: Path, tmp_path: Path, counted, of: int) -> None:
    """All of them, or one of every so many."""
    tried = [f"{key}={value}" for key in KEYS for value in ODD][::of]
    refused, again = 0, tmp_path / "again.yaml"
    for override in tried:

        def look(override: str = override) -> None:
            config = load_config(base, [override])
            again.write_text(dump_config(config))
            assert load_config(again) == config, override

        refused += said(look) is not None
    assert len(tried) > 250
    assert refused > len(tried) // 2
    if of == 1:
        counted("odd values of a config's keys", len(tried))


def test_a_damaged_file_is_taken_or_named(tmp_path: Path, counted) -> None:
    rng, path, refused = random.Random(0), tmp_path / "config.yaml", []
    files = [each.read_text() for each in sorted(CONFIGS.glob("*.yaml"))]
    pieces = ["\t", "- ", ": ", "{", "]", "#", "\x00", "&a", "*a", "!!binary ", "\ufeff", "?", "|\n", "%", "\ud7ff"]
    for _ in range(200):
        text = rng.choice(files)
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(pieces) + text[at + rng.choice([0, 0, 1, 9]) :]
        path.write_text(text)
        refused.append(said(lambda: load_config(path)))
    assert all(each is None or str(path) in each or "=" in each or ":" in each for each in refused)
    assert sum(each is not None for each in refused) > 50
    counted("damaged config files", len(refused))


@pytest.mark.parametrize("text", ["a: " * 3000, "[" * 5000, "{a: " * 3000, "x: &a [1]\ny: [" + "*a," * 20000 + "]"])
def test_deep_and_wide_yaml_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert said(lambda: load_config(path))
