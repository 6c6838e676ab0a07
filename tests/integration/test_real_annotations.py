"""Cheap masks without a truth, and a few experts' masks: as the study with as many drawn, but for what nobody knows."""

import csv
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from distseg.config.schema import Config
from distseg.data.config import DataConfig
from distseg.data.decode import read_mask
from distseg.data.noise.box import BoxNoise
from distseg.data.splits import split_clean
from distseg.data.survey import read_samples
from distseg.methods.presets import PRESETS
from distseg.testing.ranks import run_ranks
from distseg.training.trainer import Preempted, Trainer

K, SEED, STEPS = 4, 3, 4
OF_TRUTH = ("noise_rate", "wrong_mass", "auroc")
WITHOUT_A_TRUTH = sorted(set(PRESETS) - {"oracle"})


def hide_references(study: Path, target: Path, count: int) -> None:
    """A copy of the folder `study` in which only the `count` training images that its seed draws have a reference."""
    shutil.copytree(study, target)
    samples = read_samples(DataConfig(root=study))
    known = {s.id for s in split_clean(samples, count, SEED)[0]} | {s.id for s in samples if s.split != "train"}
    with (target / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["id"] not in known:
            (target / row["mask"]).unlink()
            row["mask"] = ""
    with (target / "manifest.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)


def train_both(
    runtime, study: str, real: str, folder: str, presets: list[str], count: int, size: int, annotators: str = "drawn"
) -> dict:
    """Losses, parameters and what was logged, of both paths; the real one stopped half way and resumed."""
    found: dict[str, Tensor] = {}
    for preset in presets:
        for path, root, keys in (("study", study, {"clean_count": count}), ("real", real, {})):
            config = Config.model_validate(
                {
                    "name": f"{preset}-{path}",
                    "seed": SEED,
                    "data": {"root": root, "image_size": size, "pipeline": "torch", "annotators": annotators, **keys},
                    "model": {"width": 4, "depth": 1},
                    "method": {"name": preset},
                    "optim": {"name": "sgd", "lr": 0.01},
                    "train": {
                        "steps": STEPS,
                        "batch_size": 4,
                        "clean_batch_size": 2,
                        "log_every": 1,
                        "validate_every": STEPS,
                        "figure_every": 2,
                    },
                    "tracking": {"mlflow": False},
                }
            )
            run = Path(folder, config.name)
            if path == "real":
                asked = iter([False, True])
                with pytest.raises(Preempted):
                    Trainer(config, run, runtime).run(resume=False, stop_agreed=lambda asked=asked: next(asked))
            trainer = Trainer(config, run, runtime)
            trainer.run(resume=path == "real")
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            losses = [row["train/loss"] for row in rows if "train/loss" in row]
            found[f"{preset} {path} losses"] = torch.tensor(losses, dtype=torch.float64)
            found[f"{preset} {path} parameters"] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
            of_truth = {name for row in rows for name in row if name.endswith(OF_TRUTH)}
            found[f"{preset} {path} of truth"] = torch.tensor(len(of_truth))
            result = json.loads((run / "result.json").read_text())
            found[f"{preset} {path} dice"] = torch.tensor(result["test/dice"], dtype=torch.float64)
            assert (result["noise_rate"] is None) == (path == "real") and result["clean_count"] == count
            assert list((run / "figures").glob("*.png"))
    return found


def check_equal(found: dict[str, Tensor], presets: list[str]) -> None:
    for preset in presets:
        for what in ("losses", "parameters", "dice"):
            study, real = found[f"{preset} study {what}"], found[f"{preset} real {what}"]
            assert torch.equal(study, real), f"{preset}: {what}"
        assert len(found[f"{preset} real losses"]) == STEPS
        assert found[f"{preset} real of truth"] == 0, preset
    assert any(found[f"{preset} study of truth"] > 0 for preset in presets)


@pytest.fixture(scope="module")
def annotated(drawn_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn images whose cheap masks are their boxes."""
    root = tmp_path_factory.mktemp("annotated") / "data"
    shutil.copytree(drawn_data, root)
    (root / "cheap").mkdir()
    lines = (root / "manifest.csv").read_text().splitlines()
    rows = [f"{lines[0]},noisy_mask"]
    for sample, line in zip(read_samples(DataConfig(root=root)), sorted(lines[1:]), strict=True):
        assert line.startswith(f"{sample.id},")
        box = BoxNoise().draw_for(sample.id, read_mask(sample.truth), None)
        assert cv2.imwrite(str(root / "cheap" / f"{sample.id}.png"), box * np.uint8(255))
        rows.append(f"{line},cheap/{sample.id}.png")
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.mark.slow
def test_experts_masks_that_the_data_gives_are_the_study_with_as_many_drawn(annotated: Path, tmp_path: Path) -> None:
    presets = ["noisy_only", "pixel_reweight", "label_correction"]
    hide_references(annotated, tmp_path / "real", K)
    [found] = run_ranks(train_both, 1, str(annotated), str(tmp_path / "real"), str(tmp_path), presets, K, 16)
    check_equal(found, presets)


def test_all_annotations_of_an_image_too(annotated: Path, tmp_path: Path) -> None:
    """Beside the box a mask that is the reference moved by two pixels, and of every third image neither."""
    shutil.copytree(annotated, tmp_path / "study")
    lines = (tmp_path / "study" / "manifest.csv").read_text().splitlines()
    rows = [lines[0].replace("noisy_mask", "annotation:box") + ",annotation:moved"]
    for number, line in enumerate(lines[1:]):
        id, mask = line.split(",")[0], cv2.imread(str(tmp_path / "study" / line.split(",")[3]), cv2.IMREAD_UNCHANGED)
        assert cv2.imwrite(str(tmp_path / "study" / "cheap" / f"{id}_moved.png"), np.roll(mask, 2, 1))
        rows.append(f"{line},cheap/{id}_moved.png" if number % 3 else f"{line},")
    (tmp_path / "study" / "manifest.csv").write_text("\n".join(rows) + "\n")
    hide_references(tmp_path / "study", tmp_path / "real", K)
    presets = ["label_correction"]
    folders = (str(tmp_path / each) for each in ("study", "real", ""))
    [found] = run_ranks(train_both, 1, *folders, presets, K, 16, "all")
    check_equal(found, presets)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.data
@pytest.mark.parametrize("name", ["bubil_crowd", "lidc_readers"])
@pytest.mark.skipif("DISTSEG_DATA" not in os.environ, reason="DISTSEG_DATA does not name the folder of the data sets")
def test_every_method_on_masks_that_people_made(name: str, tmp_path: Path) -> None:
    study = Path(os.environ["DISTSEG_DATA"], name)
    if not study.is_dir():
        pytest.skip(f"{study} is not there")
    hide_references(study, tmp_path / "real", 10)
    presets = WITHOUT_A_TRUTH
    [found] = run_ranks(train_both, 1, str(study), str(tmp_path / "real"), str(tmp_path), presets, 10, 32, timeout=850)
    check_equal(found, presets)


def test_a_method_that_learns_from_the_truth_of_all_is_refused_by_name(
    annotated: Path, tmp_path: Path, train_ranks
) -> None:
    hide_references(annotated, tmp_path / "real", K)
    (tmp_path / "c.yaml").write_text(
        f"name: x\ndata: {{root: {tmp_path / 'real'}, image_size: 16, pipeline: torch}}\nmethod: {{name: oracle}}\n"
        "model: {width: 4, depth: 1}\ntrain: {steps: 1}\ntracking: {mlflow: false}\n"
    )
    done = train_ranks(1, "--config", str(tmp_path / "c.yaml"), "--runs-dir", str(tmp_path / "runs"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "has none (and 15 more)" in done.stderr
