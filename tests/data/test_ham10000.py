"""HAM10000's own folders, with its table of lesions."""

import logging
from pathlib import Path

import pytest
from PIL import Image

from distseg.data.config import DataConfig
from distseg.data.survey import survey
from distseg.errors import UserError

LESIONS = 12
VIEWS = 3


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """36 images of 12 lesions in two parts: those of one lesion lie in both."""
    rows = ["lesion_id,image_id,dx,dx_type,age,sex,localization"]
    for folder in ("HAM10000_images_part_1", "HAM10000_images_part_2", "HAM10000_segmentations_lesion_tseg"):
        (tmp_path / folder).mkdir()
    for number in range(LESIONS * VIEWS):
        id = f"ISIC_{24306 + number:07d}"
        Image.new("RGB", (6, 4)).save(tmp_path / f"HAM10000_images_part_{1 + number % 2}/{id}.jpg")
        Image.new("L", (6, 4), 255).save(tmp_path / f"HAM10000_segmentations_lesion_tseg/{id}_segmentation.png")
        rows.append(f"HAM_{number % LESIONS:07d},{id},nv,histo,45.0,male,back")
    (tmp_path / "HAM10000_metadata.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_lesions_are_groups_that_no_split_parts(root: Path) -> None:
    samples, problems = survey(DataConfig(root=root, val_fraction=0.3, test_fraction=0.3))
    assert not problems
    assert len(samples) == LESIONS * VIEWS
    splits: dict[str, set[str]] = {}
    for sample in samples:
        assert sample.reference is not None
        assert sample.reference.stem == f"{sample.id}_segmentation"
        splits.setdefault(sample.group, set()).add(sample.split)
    assert len(splits) == LESIONS
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == {"train", "val", "test"}


def test_without_the_table_it_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "HAM10000_metadata.csv").unlink()
    with caplog.at_level(logging.WARNING, logger="distseg"):
        samples, _ = survey(DataConfig(root=root))
    assert {sample.group for sample in samples} == {""}
    assert "may be in two splits" in caplog.text


@pytest.mark.parametrize("content", ["image_id,x\na,b\n", "lesion_id\nb\n", '"lesion_id', "lesion_id,image_id\na\n"])
def test_a_table_of_something_else_is_refused(root: Path, content: str) -> None:
    (root / "HAM10000_metadata.csv").write_text(content)
    with pytest.raises(UserError, match=r"HAM10000_metadata\.csv: (lacks the column|cannot be read)"):
        survey(DataConfig(root=root))


def test_an_image_in_both_parts_is_a_problem(root: Path) -> None:
    Image.new("RGB", (6, 4)).save(root / "HAM10000_images_part_2/ISIC_0024306.jpg")
    samples, problems = survey(DataConfig(root=root))
    assert [problem.id for problem in problems] == ["ISIC_0024306"]
    assert "HAM10000_images_part_1 too" in problems[0].reason
    assert "ISIC_0024306" not in {sample.id for sample in samples}


def test_masks_that_are_missing_are_named(root: Path) -> None:
    (root / "HAM10000_segmentations_lesion_tseg").rename(root / "masks_elsewhere")
    with pytest.raises(UserError, match="HAM10000_segmentations_lesion_tschandl/; they are missing"):
        survey(DataConfig(root=root))
