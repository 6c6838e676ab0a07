"""prepare --import and --export as a user types them."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distseg.cli.prepare import main
from distseg.cli.process import run_command

ROOT = Path(__file__).parents[2]
FILES = ROOT / "tests/data/formats/files"


def prepare(*arguments: str | Path) -> int:
    return run_command(lambda: main([str(argument) for argument in arguments]))


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    """tasks.json of Label Studio: 20 images, all with a box by anna, every second with an expert's."""
    (tmp_path / "media").mkdir()
    tasks = []
    for number in range(20):
        pixels = np.full((16, 24, 3), 200, np.uint8)
        pixels[4:12, 6:18] = 10 * number  # so that no two images are the same
        Image.fromarray(pixels).save(tmp_path / f"media/{number:02d}.png")
        sides = {"width": 20 + 8 * (number % 5), "height": 25 + 15 * (number // 5)}  # nor two masks
        box = {"x": 10, "y": 10, **sides, "rectanglelabels": ["lesion"]}
        result = [{"type": "rectanglelabels", "original_width": 24, "original_height": 16, "value": box}]
        annotations = [{"completed_by": {"email": "anna"}, "result": result}]
        if number % 2:
            annotations.append({"completed_by": {"email": "eva"}, "ground_truth": True, "result": result})
        tasks.append({"data": {"image": f"{number:02d}.png"}, "annotations": annotations})
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    (tmp_path / "config.yaml").write_text(
        f"{{name: own, data: {{root: {tmp_path}/out}}, train: {{steps: 1, batch_size: 2}}}}"
    )
    return tmp_path


def test_an_import_tells_what_there_is_and_is_good_data(tool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("--import", f"label-studio={tool}/tasks.json", "--images", tool / "media", "--to", tool / "out") == 0
    first, classes, keys = capsys.readouterr().out.splitlines()
    assert first.endswith("out: 20 images (20 whose split is to be drawn), 10 references, 20 annotations")
    assert classes == "classes: background, lesion"
    root, mapping = shlex.split(keys.partition(": ")[2])
    assert mapping == 'data.classes={"background": 0, "lesion": 1}'
    assert prepare("--config", tool / "config.yaml", root) == 0
    assert "no problems" in capsys.readouterr().out


@pytest.mark.parametrize("format", ["label-studio", "cvat", "coco", "nnunet"])
def test_there_and_back(tool: Path, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("--import", f"label-studio={tool}/tasks.json", "--to", tool / "out") == 0
    data = ("--config", tool / "config.yaml")
    role = () if format == "label-studio" else ("--as", "reference")
    assert prepare(*data, "--export", format, *role, "--to", tool / "exported") == 0
    exported = capsys.readouterr().out.splitlines()[-1]
    assert exported.endswith("20 images" if format == "label-studio" else "10 images; 10 without such a mask")
    assert prepare("--import", f"{format}={tool}/exported", *role, "--to", tool / "back") == 0
    for path in (tool / "back/references").iterdir():
        np.testing.assert_array_equal(
            np.asarray(Image.open(path)), np.asarray(Image.open(tool / "out/references" / path.name))
        )
    assert len(list((tool / "back/references").iterdir())) == 10


def masks_in(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in folder.iterdir()}


@pytest.mark.parametrize("format", ["label-studio", "cvat", "coco", "nnunet"])
def test_three_classes_there_and_back_by_the_keys_that_are_printed(
    tmp_path: Path, tool: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With pixels to be ignored, which the first import cannot have."""
    files = ("--import", f"coco={FILES / 'coco'}", "--as", "reference")
    files += ("--import", f"cvat={FILES / 'cvat.zip'}", "--as", "annotation:anna", "--unmarked", "empty")
    assert prepare(*files, "--to", tmp_path / "joined") == 0
    for role in ("references", "annotations/anna"):
        path = tmp_path / "joined" / role / "touching.png"
        mask = np.array(Image.open(path))
        mask[:2] = 255
        Image.fromarray(mask).save(path)
    keys = shlex.split(capsys.readouterr().out.splitlines()[-1].partition(": ")[2])
    assert keys[1:] == ['data.classes={"background": 0, "skin lesion": 1, "hair - ruler": 2}']
    role = () if format == "label-studio" else ("--as", "annotation:anna")
    exported = tmp_path / "exported"
    data = ("--config", tool / "config.yaml", *keys, "data.ignore=[255]")
    assert prepare(*data, "--export", format, *role, "--to", exported) == 0
    assert prepare("--import", f"{format}={exported}", *role, "--unmarked", "empty", "--to", tmp_path / "back") == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(printed.partition(": ")[2])[1:] == [keys[1], "data.ignore=[255]"]
    one, other = masks_in(tmp_path / "joined/annotations/anna"), masks_in(tmp_path / "back/annotations/anna")
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_data_that_cannot_be_trained_on_yet_can_be_exported(tool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody has marked anything in it: that is what the tool is for."""
    (tool / "out/images").mkdir(parents=True)
    (tool / "out/annotations").mkdir()
    for number in range(3):
        (tool / f"out/images/{number}.png").write_bytes((tool / f"media/{number:02d}.png").read_bytes())
        Image.new("L", (24, 16)).save(tool / f"out/annotations/{number}.png")
    assert prepare("--config", tool / "config.yaml") == 2
    assert prepare("--config", tool / "config.yaml", "--export", "cvat", "--to", tool / "exported.zip") == 0
    assert (tool / "exported.zip").exists()


def test_options_are_of_the_import_before_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = (f"coco={FILES / 'coco'}", f"cvat={FILES / 'cvat.zip'}")
    roles = ("reference", "annotation:bob")
    said = [word for file, role in zip(files, roles, strict=True) for word in ("--import", file, "--as", role)]
    assert prepare(*said, "--unmarked", "skip", "--to", tmp_path / "out") == 0
    assert "4 references, 4 annotations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--import", "coko=x", "--to", "out"], "FORMAT one of label-studio | cvat | coco | nnunet"),
        (["--import", "coco", "--to", "out"], "FORMAT=PATH"),
        (["--import", "coco=x"], "--import needs --to PATH"),
        (["--config", "x", "--export", "coco"], "--export needs --to PATH"),
        (["--to", "out"], "is for --import and --export"),
        (["--report", "out"], "--config"),
        (["--config", "x", "--unmarked", "skip"], "is for --import"),
        (["--config", "x", "--export", "coco", "--images", "x", "--to", "out"], "is for --import"),
        (["--config", "x", "--export", "coco", "--cache", "x", "--to", "out"], "--export does nothing else"),
        (["--as", "reference", "--import", "coco=x", "--to", "out"], "write it after the --import"),
        (["--import", "coco=x", "--as", "a", "--as", "b", "--to", "out"], "is said twice"),
        (["--import", "coco=x", "--export", "coco", "--to", "out"], "is another command"),
        (["--import", "coco=x", "--noisy-masks", "x", "--to", "out"], "--noisy-masks x: is another command"),
        (["--import", "coco=x", "--to", "out", "data.max_pixels=1"], "need --config"),
        (["--import", "coco=~nobody-of-this-name/x", "--to", "out"], "no such user"),
    ],
)
def test_options_that_make_no_sense(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--import", f"coco={FILES / 'coco'}", "--to", "out"], "does not say whose masks"),
        (["--import", f"coco={FILES / 'coco'}", "--as", "expert", "--to", "out"], "--as expert: must be"),
        (["--import", f"coco={FILES / 'coco'}", "--as", "annotation:a/b", "--to", "out"], "must not hold any of"),
        (["--import", f"coco={FILES / 'coco'}", "--as", "annotation:", "--to", "out"], "--as annotation:: must be"),
        (["--import", f"coco={FILES / 'coco'}", "--as", "reference", "--to", "out"], "--unmarked empty"),
        (["--import", f"coco={FILES / 'coco'}", "--as", "reference", "--to", "no/out"], "does not exist"),
        (["--import", f"coco={FILES}", "--as", "reference", "--to", "out"], "name the file"),
    ],
)
def test_an_import_that_is_refused_ends_with_two_and_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepare(*arguments) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert reason in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["xml", "COCO"])
def test_an_unknown_export_is_refused(tool: Path, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("--import", f"label-studio={tool}/tasks.json", "--to", tool / "out") == 0
    data = ("--config", tool / "config.yaml")
    assert prepare(*data, "--export", format, "--to", tool / "exported") == 2
    assert "must be label-studio | cvat | coco | nnunet" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["pycocotools", "nibabel"])
def test_a_package_that_is_missing_is_named_with_its_mend(
    tool: Path, monkeypatch: pytest.MonkeyPatch, package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    if package == "pycocotools":
        source = f"label-studio={tool}/tasks.json"
    else:
        for name in ("imagesTr/A_0000.nii", "labelsTr/A.nii"):
            (tool / "Dataset001_x" / name).parent.mkdir(parents=True)
            (tool / "Dataset001_x" / name).write_bytes(b"x")
        description = {"labels": {"background": 0}, "channel_names": {"0": "CT"}, "file_ending": ".nii"}
        (tool / "Dataset001_x/dataset.json").write_text(json.dumps(description))
        source = f"nnunet={tool}/Dataset001_x"
    role = () if package == "pycocotools" else ("--as", "reference")
    assert prepare("--import", source, *role, "--to", tool / "out") == 2
    assert f"pip install {package}" in capsys.readouterr().err
    assert not (tool / "out").exists()


def test_bounds_are_those_of_a_config(tool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ("--import", f"label-studio={tool}/tasks.json", "--to", tool / "out")
    assert prepare(*source, "--config", tool / "config.yaml", "data.max_pixels=100") == 2
    assert "data.max_pixels (100)" in capsys.readouterr().err
