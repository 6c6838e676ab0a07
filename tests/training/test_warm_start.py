"""`model.init_from`: what a run begins with, on any ranks and under any ZeRO stage, and that it is read once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distseg.config.load import dump_config
from distseg.config.schema import Config
from distseg.distributed.engine import module_state
from distseg.errors import UserError
from distseg.models.unet import UNet
from distseg.run_folder import RunFolder
from distseg.testing.ranks import run_ranks
from distseg.training.trainer import Trainer
from distseg.training.warm_start import digest_of_start, warm_start


def config_of(root: str, source: str, stage: int, classes: int = 2) -> Config:
    data = {"root": root, "image_size": 16, "clean_count": 4, "pipeline": "torch"}
    if classes == 3:
        data["classes"] = {"background": [0], "lesion": [255], "other": [9]}
    return Config.model_validate(
        {
            "name": "t",
            "data": data,
            "model": {"width": 4, "depth": 1, "norm": "batch", "init_from": source},
            "method": {"name": "clean_only"},
            "train": {"steps": 1, "batch_size": 2, "clean_batch_size": 2},
            "deepspeed": {"zero_stage": stage},
            "tracking": {"mlflow": False},
        }
    )


def built(runtime, root: str, source: str, folder: str, stage: int) -> dict[str, Tensor]:
    trainer = Trainer(config_of(root, source, stage), Path(folder), runtime)
    state = module_state(trainer.engine)
    trainer.close()
    return {name: tensor.detach().float().cpu().clone() for name, tensor in state.items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    path = tmp_path / "source.safetensors"
    save_file(UNet(4, 1, "batch").state_dict(), path)
    return path


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))])
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_rank_and_stage_begins_with_it(
    drawn_data: Path, source: Path, tmp_path: Path, ranks: int, stage: int
) -> None:
    states = run_ranks(built, ranks, str(drawn_data), str(source), str(tmp_path / "run"), stage)
    expected = load_file(source)
    actual = states[0]  # gathered from all of them
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor.float()), name
    record = json.loads((tmp_path / "run" / "init.json").read_text())
    assert len(record["taken"]) == len(expected) and record["file"] == str(source)


def test_it_is_read_once_and_what_changed_is_refused(source: Path, tmp_path: Path) -> None:
    folder, network = RunFolder(tmp_path / "new"), UNet(4, 1, "batch", out_channels=3)
    warm_start(network, source, folder, main=True)
    assert torch.equal(network.stem[0].weight, load_file(source)["stem.0.weight"])
    record = json.loads(folder.init.read_text())
    assert len(record["other_shape"]) == 2 and digest_of_start(folder) == record["sha256"]

    # Killed before its first checkpoint: the same file again, or none.
    folder.config.write_text(dump_config(config_of(".", str(source), 0)))
    warm_start(network, source, folder, main=True)
    other = tmp_path / "other.safetensors"
    save_file(UNet(4, 1, "batch").state_dict(), other)
    with pytest.raises(UserError, match="has changed since this run began with it"):
        warm_start(network, other, folder, main=True)

    (folder.checkpoints / "step_00000001").mkdir(parents=True)
    before = network.head.weight.clone()
    warm_start(network, tmp_path / "gone", folder, main=True)
    assert torch.equal(network.head.weight, before)


@pytest.mark.slow
def test_a_run_from_a_run_and_its_resumption(drawn_data: Path, tmp_path: Path, train: Callable) -> None:
    """More classes than before: the source's files are gone when it is resumed."""
    for name, source, classes in (("first", None, 2), ("second", "first", 3)):
        config = config_of(str(drawn_data), str(tmp_path / str(source)), 0, classes)
        model = config.model.model_copy(update={"init_from": source and tmp_path / source})
        text = dump_config(config.model_copy(update={"name": name, "model": model}))
        (tmp_path / f"{name}.yaml").write_text(text)
        done = train(0, "--config", str(tmp_path / f"{name}.yaml"), "--runs-dir", str(tmp_path))
        assert done.returncode == 0, done.stderr
    assert "44 tensors taken; 2 of another shape: head.weight (1, 4, 1, 1) there, (3, 4, 1, 1) here" in done.stdout
    names = [name for name in UNet(4, 1, "batch").state_dict() if "head" not in name]
    assert json.loads((tmp_path / "second" / "init.json").read_text())["taken"] == names
    shutil.rmtree(tmp_path / "first")
    (tmp_path / "second" / "result.json").unlink()
    arguments = ("--config", str(tmp_path / "second.yaml"), "--runs-dir", str(tmp_path), "--resume")
    again = train(0, *arguments)
    assert again.returncode == 0 and "tensors taken" not in again.stdout, again.stderr
    assert (tmp_path / "second" / "result.json").exists()


def test_refused(tmp_path: Path) -> None:
    folder, network = RunFolder(tmp_path / "new"), UNet(4, 1)
    (tmp_path / "text.safetensors").write_text("no tensors")
    torch.save(network.state_dict(), tmp_path / "pickle.pt")
    save_file(UNet(6, 1).state_dict(), tmp_path / "wide.safetensors")
    for name, said in (
        ("none", "no such file or run"),
        ("text.safetensors", "cannot be read"),
        ("pickle.pt", "cannot be read"),
        ("wide.safetensors", "none of its 16 tensors"),
        (".", "has no checkpoint last"),
    ):
        with pytest.raises(UserError, match=said):
            warm_start(network, tmp_path / name, folder, main=True)
    assert not folder.path.exists()
