"""`distseg predict`: what it writes, what it refuses, and that neither ranks nor kills change a byte."""

import csv
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import interpolate

from distseg.cli.predict import main
from distseg.config.load import load_config
from distseg.data.augment import CHANNEL_DEVIATIONS, CHANNEL_MEANS
from distseg.distributed.runtime import stop_runtime
from distseg.models.registry import build_model
from distseg.testing.forked import run_script, start_script
from distseg.testing.launcher import train_environment

ROOT = Path(__file__).parents[2]
ENVIRONMENT = train_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ALL = ["--probabilities", "png", "--contours", "geojson", "--overlays", "--batch-size", "3"]


def predict(*arguments: str | Path) -> int:
    code = main([str(argument) for argument in arguments])
    stop_runtime()
    return code


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that a folder of predictions holds, without the times."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del files["run.lock"], files["done.jsonl"]
    files["table.csv"] = repr([{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(folder)]).encode()
    return files


def plain_logits(run: Path, path: Path, size: int, step: int = 1) -> np.ndarray:
    """By PIL and torch alone: the whole image squashed, batch 1, no_grad, enlarged to the image's size."""
    network = build_model(load_config(run / "config.yaml").model).eval()
    network.load_state_dict(load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors"))
    image = Image.open(path).convert("RGB")
    small = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), np.float32) / 255
    batch = torch.from_numpy(((small - CHANNEL_MEANS) / CHANNEL_DEVIATIONS).astype(np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = network(batch)
    return interpolate(logits, (image.height, image.width), mode="bilinear", align_corners=False)[0, 0].numpy()


def test_masks_have_the_files_size_and_equal_a_plain_loop(make_run: Callable, pictures: Path, tmp_path: Path) -> None:
    run, to = make_run(), tmp_path / "out"
    assert predict(run, pictures, "--to", to, *ALL) == 0
    rows = {row["id"]: row for row in rows_of(to)}
    files = [path for path in pictures.rglob("*") if path.is_file()]
    assert rows.keys() == {path.stem for path in files} and len(files) == 10
    shares = []
    for path in files:
        mask = Image.open(to / "masks" / f"{path.stem}.png")
        expected = plain_logits(run, path, 32)
        assert mask.mode == "L" and mask.size == Image.open(path).size
        actual, probability = np.asarray(mask), 1 / (1 + np.exp(-expected.astype(np.float64)))
        sure = np.abs(expected) > 1e-4
        np.testing.assert_array_equal(actual[sure], np.where(expected > 0, 255, 0)[sure])
        written = np.asarray(Image.open(to / "probabilities" / f"{path.stem}.png")).astype(np.float64)
        assert np.abs(written / 65535 - probability).max() < 1e-4
        row = rows[path.stem]
        assert int(row["area"]) == (actual > 0).sum()
        assert int(row["components"]) == cv2.connectedComponents(actual, connectivity=8)[0] - 1
        assert 0.5 <= float(row["confidence"]) <= 1 and float(row["seconds"]) > 0
        polygons = json.loads((to / "contours" / f"{path.stem}.geojson").read_text())["features"]
        assert len(polygons) == int(row["components"])
        drawn = np.zeros_like(actual)
        for polygon in polygons:
            outer, *holes = (np.array(ring) for ring in polygon["geometry"]["coordinates"])
            cv2.fillPoly(drawn, [np.round(outer).astype(np.int32)], 255)
            for hole in holes:
                inside = np.zeros_like(actual)
                cv2.fillPoly(inside, [np.round(hole).astype(np.int32)], 255)
                drawn[(inside > 0) & (actual == 0)] = 0
        assert (drawn != actual).mean() < 0.02
        assert Image.open(to / "overlays" / f"{path.stem}.jpg").size == mask.size
        shares.append((actual > 0).mean())
    assert 0.05 < np.mean(shares) < 0.95, "the network says the same of everything, which tests nothing"


def test_a_chosen_checkpoint_and_its_change(make_run: Callable, pictures: Path, tmp_path: Path) -> None:
    run, to = make_run(steps=(1, 2)), tmp_path / "out"
    assert predict(run, pictures / "a.png", "--to", to, "--checkpoint", "best") == 0
    first = (to / "masks" / "a.png").read_bytes()
    assert predict(run, pictures / "a.png", "--to", to, "--checkpoint", "2") == 0
    expected = plain_logits(run, pictures / "a.png", 32, step=2)
    assert (np.asarray(Image.open(to / "masks" / "a.png")) > 0).sum() == pytest.approx((expected > 0).sum(), abs=3)
    assert (to / "masks" / "a.png").read_bytes() != first
    assert json.loads((to / "predict.json").read_text())["network"]["step"] == 2


def test_what_is_done_stays_and_what_changed_does_not(make_run: Callable, pictures: Path, tmp_path: Path) -> None:
    run, to = make_run(), tmp_path / "out"
    assert predict(run, pictures, "--to", to) == 0
    stamps = {path.name: path.stat().st_mtime_ns for path in (to / "masks").iterdir()}
    (to / "masks" / "f.png").unlink()
    (pictures / "a.png").write_bytes((pictures / "i.png").read_bytes())
    assert predict(run, pictures, "--to", to) == 0
    now = {path.name: path.stat().st_mtime_ns for path in (to / "masks").iterdir()}
    assert {name for name in stamps if now[name] != stamps[name]} == {"a.png", "f.png"}
    assert Image.open(to / "masks" / "a.png").size == Image.open(pictures / "i.png").size


def test_a_broken_file_is_named_and_the_rest_go_on(
    make_run: Callable, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, to = make_run(), tmp_path / "out"
    (pictures / "b.jpg").write_bytes((pictures / "b.jpg").read_bytes()[:200])
    (pictures / "c.png").write_text("no image")
    assert predict(run, pictures, "--to", to) == 1
    assert len(rows_of(to)) == 9
    with (to / "failed.csv").open(encoding="utf-8") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["b", "c"]
    assert "2 failed" in capsys.readouterr().out
    (pictures / "c.png").unlink()
    (pictures / "b.jpg").write_bytes((pictures / "h.jpg").read_bytes())
    assert predict(run, pictures, "--to", to) == 0
    assert not (to / "failed.csv").exists() and len(rows_of(to)) == 10


def test_lists_tables_links_and_an_output_folder_inside(
    make_run: Callable, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    (tmp_path / "outside.png").write_bytes((pictures / "a.png").read_bytes())
    (pictures / "outside.png").symlink_to(tmp_path / "outside.png")
    (pictures / "inside.png").symlink_to(pictures / "a.png")
    to = pictures / "out"
    for _ in range(2):  # its own masks are no images
        assert predict(run, pictures, "--to", to) == 1
        assert {row["id"] for row in rows_of(to)} >= {"inside", "Läsion é", "d 'q'"}
        assert len(rows_of(to)) == 11
        assert "leads out" in (to / "failed.csv").read_text()

    table = pictures / "some.csv"
    table.write_text("id,image\none,below/e.tif\ntwo,../outside.png\n")
    assert predict(run, table, "--to", tmp_path / "table") == 1
    assert [row["id"] for row in rows_of(tmp_path / "table")] == ["one"]

    class Stdin:
        buffer = open(tmp_path / "list", "w+b")  # noqa: SIM115, PTH123

    Stdin.buffer.write(f"{pictures / 'a.png'}\n{pictures / 'Läsion é.png'}\n".encode())
    Stdin.buffer.seek(0)
    monkeypatch.setattr(sys, "stdin", Stdin)
    assert predict(run, "-", "--to", tmp_path / "listed") == 0
    assert {row["id"] for row in rows_of(tmp_path / "listed")} == {"a", "Läsion é"}


def test_earlier_predictions_below_an_input_are_no_inputs(make_run: Callable, pictures: Path, tmp_path: Path) -> None:
    run = make_run()
    assert predict(run, pictures / "a.png", "--to", pictures / "below" / "earlier", "--overlays") == 0
    assert predict(run, pictures, "--to", tmp_path / "out") == 0
    assert len(rows_of(tmp_path / "out")) == 10
    masks = pictures / "below" / "earlier" / "masks"
    assert predict(run, masks, "--to", tmp_path / "of_masks") == 0, "a folder that is named is meant"


def test_refused(make_run: Callable, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, full = make_run(), tmp_path / "full"
    full.mkdir()
    (full / "kept.part").write_text("somebody's")
    shutil.copy2(pictures / "a.png", pictures / "below" / "a.png")
    for arguments, said in (
        ([run, pictures, "--to", tmp_path / "out"], f"{pictures}/a.png and {pictures}/below/a.png: their outputs"),
        ([run, tmp_path / "none", "--to", tmp_path / "out"], "none: no such file or folder"),
        ([run, tmp_path / "none.csv", "--to", tmp_path / "out"], "none.csv: no such file or folder"),
        (
            [tmp_path / "norun", pictures / "a.png", "--to", tmp_path / "out"],
            "norun: has no checkpoint last; there is no",
        ),
        ([run, pictures / "a.png", "--to", tmp_path / "out", "--checkpoint", "7"], "it has those of the steps 1"),
        ([run, pictures / "a.png", "--to", full], "holds other things than predictions"),
        ([run, full, "--to", tmp_path / "out"], "holds no images"),
        ([run, pictures, "--to", pictures], "is in the folder that --to names"),
    ):
        assert predict(*arguments) == 2
        assert said in capsys.readouterr().err
    assert (full / "kept.part").read_text() == "somebody's" and not (tmp_path / "out").exists()
    assert predict(run, pictures / "a.png", "--to", tmp_path / "out") == 0
    assert predict(run, pictures / "below" / "a.png", pictures / "i.png", "--to", tmp_path / "out") == 0, "moved"
    (pictures / "below" / "a.png").write_bytes((pictures / "i.png").read_bytes())
    assert predict(run, pictures / "below" / "a.png", "--to", tmp_path / "out") == 2
    assert "under the name a" in capsys.readouterr().err


def test_several_classes(make_run: Callable, pictures: Path, tmp_path: Path) -> None:
    """Values of the config's, one column of the table for each class, probabilities that sum to 1, COCO."""
    classes = 'data.classes={background: [0, "#000000"], mole: [7], vein: [9]}'
    run, to = make_run(classes, "model.width=3"), tmp_path / "out"
    assert predict(run, pictures, "--to", to, "--probabilities", "npz", "--contours", "coco") == 0
    for row in rows_of(to):
        mask = np.asarray(Image.open(to / "masks" / f"{row['id']}.png"))
        assert set(np.unique(mask).tolist()) <= {0, 7, 9}
        assert int(row["area:vein"]) == (mask == 9).sum()
        probabilities = np.load(to / "probabilities" / f"{row['id']}.npz")["probabilities"]
        assert np.abs(probabilities.astype(float).sum(axis=0) - 1).max() < 5e-3
    coco = json.loads((to / "contours.json").read_text())
    assert [each["name"] for each in coco["categories"]] == ["mole", "vein"] and len(coco["images"]) == 10


def words(run: Path, pictures: Path, to: Path, *more: str) -> list[str]:
    return ["launch/predict.py", str(run), str(pictures), "--to", str(to), *ALL, *more]


def test_two_ranks_give_the_bytes_of_one(make_run: Callable, pictures: Path, tmp_path: Path) -> None:
    run = make_run("data.shape=letterbox")
    (pictures / "broken.png").write_text("no image")
    assert predict(run, pictures, "--to", tmp_path / "one", *ALL, "--flips", "--right-angles") == 1
    ranks = run_script(words(run, pictures, tmp_path / "two", "--flips", "--right-angles"), ROOT, ENVIRONMENT, ranks=2)
    assert [rank.returncode for rank in ranks] == [1, 1], ranks
    assert sum("broken.png" in rank.stderr for rank in ranks) == 1
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_killed_and_started_again_gives_the_same_files(make_run: Callable, pictures: Path, tmp_path: Path) -> None:
    run = make_run()
    assert predict(run, pictures, "--to", tmp_path / "whole", *ALL) == 0
    rng, to = random.Random(0), tmp_path / "killed"
    kills = 0
    for target in (1, 3, 6):
        files = (tmp_path / f"{target}.{stream}" for stream in ("stdout", "stderr"))
        process = start_script(words(run, pictures, to), ROOT, ENVIRONMENT, *files)
        deadline = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline:
            if len([*to.glob("masks/*.png")]) >= target:
                break
            time.sleep(0.001)
        time.sleep(rng.random() / 50)
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills, "it was too quick to be killed"
    assert predict(run, pictures, "--to", to, *ALL) == 0
    whole, killed = contents(tmp_path / "whole"), contents(to)
    assert whole.keys() == killed.keys()
    assert [name for name in whole if whole[name] != killed[name]] == []


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 × 15,000 pixels."""
    path = tmp_path_factory.mktemp("large") / "l.png"
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8))
    coarse.resize((20000, 15000), Image.Resampling.NEAREST).save(path, compress_level=1)
    return path


FIRST_ROWS = """
import resource, sys, torch
from pathlib import Path
from distseg.inference.predictor import Predictor
keys = ["data.max_pixels=300000000"]
predictor = Predictor.of_run(Path(sys.argv[1]), torch.device("cpu"), overrides=keys)
rows = 0
for strip in next(predictor.strips([predictor.read(Path(sys.argv[2]))])):
    rows += strip.shape[1]
    if rows > 300:
        break
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.faults  # minutes
def test_a_network_of_width_16_over_the_first_row_of_its_tiles(make_run: Callable, large: Path) -> None:
    """The default overlap. What it takes is the same in every row."""
    run = make_run("data.shape=crop", "data.image_size=512", "model.width=16", "model.depth=4", "model.norm=group")
    command = [sys.executable, "-c", FIRST_ROWS, str(run), str(large)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    rows, kib = map(int, done.stdout.split())
    unit = 1 if sys.platform == "darwin" else 1024
    assert rows > 300 and kib * unit < 1.9 * 2**30, f"{kib * unit / 2**30:.2f} GiB"


@pytest.mark.faults  # minutes, and close to its limit on some processors
def test_an_image_of_20000_by_15000_takes_less_than_2_gib(make_run: Callable, large: Path, tmp_path: Path) -> None:
    run, path = make_run("data.shape=crop", "data.image_size=512", "model.width=1", "model.depth=1"), large
    measured = (
        "import resource, sys; from distseg.cli.predict import main; code = main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    arguments = [str(run), str(path), "--to", str(tmp_path / "out"), "--set", "data.max_pixels=300000000"]
    arguments += ["--set", "data.overlap=0"]
    done = subprocess.run(
        [sys.executable, "-c", measured, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr
    kib = int(done.stdout.splitlines()[-1])
    unit = 1 if sys.platform == "darwin" else 1024
    assert kib * unit < 2 * 2**30, f"{kib * unit / 2**30:.2f} GiB"
    shown = cv2.imread(str(tmp_path / "out" / "masks" / "l.png"), cv2.IMREAD_UNCHANGED)
    assert shown.shape == (15000, 20000) and 0.01 < (shown > 0).mean() < 0.99
