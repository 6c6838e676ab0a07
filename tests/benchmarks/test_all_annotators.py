import csv
from pathlib import Path

import cv2
import numpy as np

from benchmarks.all_annotators import list_annotators
from distseg.data.config import DataConfig
from distseg.data.survey import read_samples


def test_every_mask_of_an_image_is_listed_by_its_annotator(tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = ["images/a.png", "images/a_b.png", "masks/a.png", "masks/a_b.png", "noisy_masks/a.png"]
    files += ["crowd/a_w1.png", "crowd/a_w2.png", "crowd/a_b_w2.png"]
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(source / name), np.zeros((4, 4), np.uint8))
    rows = "a,train,images/a.png,masks/a.png,noisy_masks/a.png\na_b,val,images/a_b.png,masks/a_b.png,\n"
    (source / "manifest.csv").write_text("id,split,image,mask,noisy_mask\n" + rows)
    (tmp_path / "target").mkdir()
    assert list_annotators(source, "crowd", tmp_path / "target") == 2
    with (tmp_path / "target" / "manifest.csv").open(newline="") as file:
        assert next(csv.reader(file)) == ["id", "split", "image", "reference", "annotation:w1", "annotation:w2"]
    found = {
        s.id: [each.annotator for each in s.annotations] for s in read_samples(DataConfig(root=tmp_path / "target"))
    }
    assert found == {"a": ["w1", "w2"], "a_b": ["w2"]}
