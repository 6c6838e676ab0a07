"""Damaged at random, a file or table is read or refused in one line, and what the check accepts can be trained on."""

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distseg.data.config import DataConfig
from distseg.data.decode import PLAIN, read_image, read_mask, read_resized_image, read_resized_mask
from distseg.data.geometry import Frame
from distseg.data.inspect import inspect_image, inspect_mask
from distseg.data.survey import survey
from distseg.errors import BadFileError, UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
FORMATS = {
    "JPEG": {},
    "progressive JPEG": {"format": "JPEG", "progressive": True},
    "PNG": {},
    "BMP": {},
    "TIFF": {},
    "deflated TIFF": {"format": "TIFF", "compression": "tiff_adobe_deflate"},
    "WEBP": {},
    "JPEG2000": {},
}


def pictures(name: str) -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    mask = np.zeros((40, 56), np.uint8)
    mask[5:20, 8:30] = 255
    files = []
    for picture in (Image.fromarray(noise), Image.fromarray(mask), Image.fromarray(mask).convert("P")):
        if picture.mode == "P" and name in ("JPEG", "progressive JPEG", "JPEG2000"):
            continue
        file, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = 6
        picture.save(file, **({"format": name, "exif": exif} | FORMATS[name]))
        files.append(file.getvalue())
    return files


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, most often near the front, or bytes lost at the end or within, or strange ones put in."""
    way, at = rng.random(), rng.randrange(len(content))
    if way < 0.5:
        changed = bytearray(content)
        for _ in range(rng.choice([1, 2, 5, 20])):
            place = rng.randrange(min(len(content), rng.choice([60, 300, len(content)])))
            changed[place] = rng.choice([0, 255, rng.randrange(256)])
        return bytes(changed)
    if way < 0.7:
        return content[:at]
    if way < 0.85:
        return content[:at] + content[at + rng.randrange(1, 60) :]
    return content[:at] + rng.randbytes(rng.randrange(1, 60)) + content[at:]


def refusal(act: Callable[[], object], kind: type[UserError]) -> str | None:
    """What was said in one line, or None; any other exception is a failure."""
    try:
        act()
    except kind as error:
        assert "\n" not in str(error)
        return str(error)
    return None


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_picture_is_named_or_can_be_read(tmp_path, counted, name):
    rng, path, refused = random.Random(name), tmp_path / "file", 0
    for _ in range(60):
        path.write_bytes(damaged(rng.choice(pictures(name)), rng))
        checks = [
            refusal(lambda: inspect_image(path, PLAIN), BadFileError),
            refusal(lambda: inspect_mask(path, PLAIN), BadFileError),
        ]
        readings = [
            refusal(lambda: read_image(path), BadFileError),
            refusal(lambda: read_mask(path), BadFileError),
            refusal(lambda: read_resized_image(path, Frame(16)), BadFileError),
            refusal(lambda: read_resized_mask(path, Frame(16)), BadFileError),
        ]
        assert all(said is None or said.startswith(str(path)) for said in (*checks, *readings))
        if checks[0] is None:
            assert readings == [None] * 4
        refused += checks[0] is not None
    assert refused > 10
    counted("damaged pictures and masks", 60)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_damaged_table_is_refused_or_its_rows_are(tmp_path, counted, separator):
    rows = ["id,split,image,mask,noisy_mask", *(f"s{n},train,images/{n}.jpg,masks/{n}.png," for n in range(8))]
    table, rng = "\n".join(rows).replace(",", separator).encode(), random.Random(separator)
    manifest, read = tmp_path / "manifest.csv", 0
    for _ in range(150):
        manifest.write_bytes(damaged(table, rng))

        def look(root: Path = tmp_path) -> None:
            samples, problems = survey(DataConfig(root=root))
            assert all(str(problem).isprintable() for problem in problems)
            assert all(path.is_relative_to(root) for sample in samples for path in sample.files.values())

        read += refusal(look, UserError) is None
    assert read > 10
    counted("damaged tables", 150)
