"""`distseg export`: what its files are, hold and give, and what it refuses."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from distseg.cli.export import main
from distseg.data.decode import read_image
from distseg.errors import UserError
from distseg.inference.export import check_graph
from distseg.inference.predictor import Predictor


def export(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def test_onnx_and_program_of_any_size(
    make_run: Callable, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, to = make_run("data.shape=letterbox"), tmp_path / "out"
    assert export(run, "--to", to, "--onnx", "--program", "--check", pictures) == 0
    said = capsys.readouterr().out
    assert (
        "Symbol" not in said
        and "model.onnx: largest difference" in said
        and "model.pt2: largest difference" in said
        and "10 images" in said
    )
    session = onnxruntime.InferenceSession(str(to / "model.onnx"), providers=["CPUExecutionProvider"])
    images, size = session.get_inputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", "height", "width", 3])
    assert (size.name, size.type, size.shape) == ("size", "tensor(int64)", [2])
    assert [each.name for each in session.get_outputs()] == ["masks", "probabilities"]
    facts = json.loads(session.get_modelmeta().custom_metadata_map["distseg"])
    assert facts["classes"] == {"names": ["background", "lesion"], "values": [0, 255]}
    program = torch.export.load(to / "model.pt2").module()
    predictor = Predictor.of_run(run, torch.device("cpu"))
    for path in sorted(each for each in pictures.rglob("*") if each.is_file())[:4]:
        pixels = read_image(path)
        [prediction] = predictor.predict([predictor.read(path)])
        inputs = {"images": pixels[None], "size": np.array(pixels.shape[:2])}
        for masks in (session.run(["masks"], inputs)[0], program(*map(torch.from_numpy, inputs.values()))[0]):
            assert masks.shape == (1, *prediction.size)
            assert (np.asarray(masks)[0] != prediction.mask).mean() < 2e-3
    with zipfile.ZipFile(to / "model.pt2") as archive:
        assert sum(each.file_size for each in archive.infolist() if "sample_inputs" in each.filename) < 2000
    written = json.loads((to / "export.json").read_text())
    assert written["checks"]["model.onnx"]["difference"] < 0.02 and written["checks"]["model.onnx"]["images"] == 10
    card = (to / "model_card.md").read_text()
    assert "To be filled in" in card and "0.7077, 0.5913, 0.5467" in card.replace("\\", "")


def test_fixed_size_and_several_classes(make_run: Callable, pictures: Path, tmp_path: Path) -> None:
    run = make_run("data.classes={background: [0], a_b: [7], vein: [9]}", "model.width=3")
    to = tmp_path / "out"
    assert export(run, "--to", to, "--size", "40x64", "--check", pictures, "--images", "3") == 0
    session = onnxruntime.InferenceSession(str(to / "model.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 40, 64, 3]
    masks, probabilities = session.run(None, {"images": np.zeros((2, 40, 64, 3), np.uint8)})
    assert masks.shape == (2, 40, 64) and probabilities.shape == (2, 3, 40, 64)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert "a\\_b" in (to / "model_card.md").read_text()
    assert not (to / "model.pt2").exists()


def test_a_graph_of_another_network_is_refused(make_run: Callable, pictures: Path, tmp_path: Path) -> None:
    run = make_run()
    with pytest.raises(UserError, match=r"model.onnx: differs from the run by .* above --tolerance 0, and is removed"):
        export(run, "--to", tmp_path / "out", "--check", pictures / "a.png", "--tolerance", "0")
    assert not (tmp_path / "out" / "model.onnx").exists()
    predictor = Predictor.of_run(run, torch.device("cpu"))
    wrong = check_graph(
        predictor,
        lambda images, _: [np.ones(images.shape[:3], np.uint8), np.ones((1, 1, *images.shape[1:3]), np.float32)],
        [pictures / "a.png"],
        None,
    )
    assert wrong.difference > 0.3 and wrong.iou < 0.9
    nothing = check_graph(
        predictor,
        lambda images, _: [np.ones(images.shape[:3], np.uint8), np.full((1, 1, *images.shape[1:3]), np.nan)],
        [pictures / "a.png", pictures / "i.png"],
        None,
    )
    assert np.isnan(nothing.difference)


def test_refused(make_run: Callable, pictures: Path, tmp_path: Path) -> None:
    run = make_run()
    with pytest.raises(UserError, match=r"data.root /nowhere: no such folder; or name images to check on, --check"):
        export(run, "--to", tmp_path / "out")
    with pytest.raises(UserError, match="cut into tiles"):
        export(make_run("data.shape=crop"), "--to", tmp_path / "out", "--check", pictures)
    with pytest.raises(SystemExit):
        export(run, "--to", tmp_path / "out", "--size", "40")
    with pytest.raises(SystemExit):
        export(run, "--to", tmp_path / "out", "--register", "name")
    assert not (tmp_path / "out").exists()
