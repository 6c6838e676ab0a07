"""A new kind of noise and a new layout are one file each and their lines in a registry: nothing else changes."""

import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]

TOY_NOISE = '''
"""Masks drawn upside down."""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from distseg.data.noise.kind import AnnotatorKind, Image, Mask


class FlippedNoise(AnnotatorKind):
    kind: Literal["flipped"] = "flipped"
    rows: Annotated[int, Field(ge=1)] = 2

    def draw(self, mask: Mask, image: Image | None, rng: np.random.Generator) -> Mask:
        return np.roll(mask, self.rows, axis=0)
'''
TOY_LAYOUT = '''
"""Two files a sample, side by side: NAME.png and NAME.truth.png."""

from pathlib import Path

from distseg.data.layouts.listing import Listing
from distseg.data.sample import Sample


def read(root: Path) -> Listing | None:
    truths = sorted(root.glob("*.truth.png"))
    if not truths:
        return None
    samples = [Sample(t.name[:-10], "train", root / f"{t.name[:-10]}.png", t) for t in truths]
    return Listing(samples, [], frozenset({"train"}))
'''
USE = """
import sys
from pathlib import Path
import cv2
import numpy as np
from distseg.config.load import dump_config, load_config
from distseg.data.config import DataConfig
from distseg.data.decode import read_mask
from distseg.data.noise.write import write_noisy_masks
from distseg.data.splits import split_clean
from distseg.data.survey import survey
import distseg

tree, data = Path(sys.argv[1]), Path(sys.argv[2])
assert Path(distseg.__file__).is_relative_to(tree), distseg.__file__
config = load_config(data / "x.yaml", ["data.noise.vertices=null", "data.noise.kind=flipped", "data.noise.rows=3"])
(data / "again.yaml").write_text(dump_config(config))
assert load_config(data / "again.yaml") == config
samples, problems = survey(config.data)
assert not problems and {s.id for s in samples} == {f"s{n}" for n in range(12)}, (samples, problems)
clean, noisy = split_clean(samples, 2, 0)
written, rate = write_noisy_masks(noisy, config.data.noise, data / "noisy")
assert 0 < rate < 1
for sample in written:
    assert np.array_equal(read_mask(sample.annotations[0].mask), np.roll(read_mask(sample.truth), 3, axis=0))
assert "flipped,rows=3" in (data / "noisy" / "manifest.csv").read_text()
mixed = {"kind": "mixed", "annotators": [{"kind": "box"}, {"kind": "flipped"}]}
mixed = DataConfig.model_validate({"root": data, "noise": mixed})
print(config.data.noise.level, mixed.noise.level, config.data.layout)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package with a toy kind of noise and a toy layout added to it."""
    folder = tmp_path / "tree"
    shutil.copytree(ROOT / "distseg", folder / "distseg", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    data = folder / "distseg" / "data"
    (data / "noise" / "flipped.py").write_text(TOY_NOISE)
    (data / "layouts" / "side_by_side.py").write_text(TOY_LAYOUT)
    registry = data / "noise" / "registry.py"
    text = registry.read_text()
    added = text.replace("    | BoxNoise\n", "    | BoxNoise\n    | FlippedNoise\n")
    assert added != text
    registry.write_text(added.replace("\nKinds", "\nfrom distseg.data.noise.flipped import FlippedNoise\n\nKinds", 1))
    layouts = data / "layouts" / "__init__.py"
    text = layouts.read_text()
    added = text.replace('    "ph2": ph2.read,\n', '    "ph2": ph2.read,\n    "side_by_side": side_by_side.read,\n')
    assert added != text
    layouts.write_text(added.replace("import folders,", "import folders, side_by_side,", 1))
    return folder


def test_a_new_kind_of_noise_and_a_new_layout_are_a_file_and_a_registry_line(tree: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(12):
        mask = np.zeros((20, 20), np.uint8)
        mask[4 : 9 + number % 3, 5:12] = 255
        assert cv2.imwrite(str(data / f"s{number}.png"), np.full((20, 20, 3), 20 * number, np.uint8))
        assert cv2.imwrite(str(data / f"s{number}.truth.png"), mask)
    (data / "x.yaml").write_text(
        f"name: x\ndata: {{root: {data}, image_size: 16, clean_count: 2, layout: side_by_side, "
        "noise: {kind: polygon, vertices: 7}}\nmodel: {depth: 2}\ntrain: {steps: 1}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tree), str(data)],
        cwd=tree, env={"PYTHONPATH": str(tree), "PATH": ""}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "flipped(3) mixed(box, flipped(2)) side_by_side"
