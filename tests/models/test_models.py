import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from distseg.errors import UserError
from distseg.models.check import check_network
from distseg.models.config import ImportedConfig, ModelConfig, UNetConfig
from distseg.models.registry import build_model
from distseg.models.unet import UNet


def test_the_papers_network_has_its_number_of_parameters() -> None:
    assert sum(p.numel() for p in UNet(width=64, depth=4, norm="none").parameters()) == 31_031_745


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("depth", [1, 3])
def test_logits_are_at_the_resolution_of_the_images(norm: str, depth: int) -> None:
    logits = UNet(width=6, depth=depth, norm=norm, out_channels=2)(torch.randn(2, 3, 24, 40))
    assert logits.shape == (2, 2, 24, 40)
    assert torch.isfinite(logits).all()


def test_every_parameter_gets_a_gradient() -> None:
    model = UNet(width=4, depth=2)
    model(torch.randn(1, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_initialisation_keeps_the_scale_of_the_signal() -> None:
    # PyTorch's default shrinks the logits of this network to about 0.05; the initialiser must do something about it.
    torch.manual_seed(0)
    logits = UNet(width=32, depth=4)(torch.randn(2, 3, 64, 64))
    assert 0.3 < logits.std() < 3


def model_config(**values) -> UNetConfig | ImportedConfig:
    return TypeAdapter(ModelConfig).validate_python(values)


def test_build_model_by_name() -> None:
    unet = build_model(model_config(name="unet", width=4, depth=1, norm="batch"))
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in unet.modules())
    options = {"in_channels": 3, "out_channels": 1, "kernel_size": 1}
    conv = build_model(model_config(name="torch.nn:Conv2d", options=options))
    assert isinstance(conv, torch.nn.Conv2d)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "unet", "options": {"width": 3}}, "options are for imported models; unet takes"),
        ({"name": "a:b", "width": 3}, r"width: no key of an imported network.*\(model\.width=null takes it back\)"),
        ({"name": "a:b", "norm": "group", "width": 3}, "norm, width: no key of an imported network"),
        ({"name": "a:b", "optons": {}}, "optons: no key of an imported network"),
        ({"name": "resnet"}, "name 'resnet' is neither `unet` nor `package.module:callable`"),
        ({"name": ":x"}, "name ':x' is neither"),
        ({"name": "..os:x"}, "name '..os:x' is neither"),
        ({"name": "os:system:x"}, "is neither"),
        ({"name": "a b:c"}, "is neither"),
        ({"name": 3}, "name 3 is neither"),
        (3, "must be a mapping, for instance {name: unet, width: 12}"),
    ],
)
def test_a_key_of_the_other_kind_is_an_error_with_the_mend(values: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TypeAdapter(ModelConfig).validate_python(values)


def test_null_takes_a_key_back() -> None:
    config = model_config(name="a:b", width=None, depth=None, options={"x": 1})
    assert config == ImportedConfig(name="a:b", options={"x": 1})


MODULE = """
from __future__ import annotations
from pathlib import Path
import torch
from torch import nn
from sibling import CHANNELS

class Net(nn.Module):
    def __init__(self, ran=None):
        super().__init__()
        self.layer = nn.Conv2d(CHANNELS, 1, 1)
    def forward(self, images):
        return {"out": self.layer(images), "aux": None}

def annotated(width: int = 3) -> nn.Module:
    return Net()

def precise() -> Net:
    return Net()

def declared():
    return Net()

declared.returns_module = True

def silent(ran):
    Path(ran).touch()
    return Net()

def other(ran) -> int:
    Path(ran).touch()
    return 3

def wrong() -> nn.Module:
    return 3

def broken() -> nn.Module:
    raise ValueError("two\\nlines")

def unresolved() -> NoSuchName:
    return Net()
"""


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "own_networks.py").write_text(MODULE)
    (tmp_path / "sibling.py").write_text("CHANNELS = 3")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)")
    (tmp_path / "broken_module.py").write_text("def f(:")
    (tmp_path / "torch.py").write_text("raise RuntimeError('the working folder must not come first')")
    monkeypatch.chdir(tmp_path)
    for name in ("own_networks", "sibling"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["Net", "annotated", "precise", "declared"])
def test_a_file_of_the_working_folder_is_found_and_its_dictionary_taken(working_folder: Path, name: str) -> None:
    before = list(sys.path)
    model = build_model(model_config(name=f"own_networks:{name}"))
    assert sys.path == before
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 1, 8, 8)
    check_network(copy.deepcopy(model), name, 8, 2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_networks:silent", "annotate the function, `def silent(…) -> nn.Module`"),
        ("own_networks:other", "annotate the function"),
        ("own_networks:unresolved", "annotate the function"),
        ("own_networks:CHANNELS", "neither an nn.Module class nor declared"),
        ("own_networks:Missing", "has no attribute 'Missing'"),
        ("os:system", "neither an nn.Module class nor declared"),
        ("os:abort", "neither an nn.Module class nor declared"),
        ("sys:exit", "neither an nn.Module class nor declared"),
        ("builtins:dict", "neither an nn.Module class nor declared"),
        ("builtins:eval", "neither an nn.Module class nor declared"),
        ("no_such_package:Net", "No module named 'no_such_package'"),
        ("torch.nn:NoSuchNet", "has no attribute 'NoSuchNet'"),
        ("leaves:Net", "SystemExit: 0"),
        ("broken_module:f", "SyntaxError"),
    ],
)
def test_what_is_not_declared_a_network_is_not_called(working_folder: Path, name: str, said: str) -> None:
    ran = working_folder / "ran"
    options = {"command": f"touch {ran}"} if name == "os:system" else {"ran": str(ran)}
    with pytest.raises(UserError) as raised:
        build_model(model_config(name=name, options=options))
    assert said in str(raised.value) and "\n" not in str(raised.value) and name in str(raised.value)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("torch.nn:Conv2d", {"kernel": 3}, "model.options {'kernel': 3}"),
        ("own_networks:wrong", {}, "returned a int, not an nn.Module"),
        ("own_networks:broken", {}, "ValueError: two lines"),
    ],
)
def test_a_call_that_makes_no_network_is_one_line(working_folder: Path, name: str, options: dict, said: str) -> None:
    with pytest.raises(UserError) as raised:
        build_model(model_config(name=name, options=options))
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_the_import_of_a_foreign_config_is_refused_unless_allowed(working_folder: Path) -> None:
    (working_folder / "leaves_a_trace.py").write_text("open('trace', 'w')\nfrom torch.nn import Conv2d as Net")
    with pytest.raises(UserError, match=r"runs code that this config names; .*--allow-import"):
        build_model(model_config(name="leaves_a_trace:Net"), allow_import=False)
    assert not (working_folder / "trace").exists()
    build_model(model_config(), allow_import=False)


class Gives(nn.Module):
    """A network whose output `change` makes of the logits."""

    def __init__(self, change: Callable[[Tensor], Any], channels: int = 1) -> None:
        super().__init__()
        self.layer, self.change, self.calls = nn.Conv2d(3, channels, 1), change, 0
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout()

    def forward(self, images: Tensor) -> Any:
        self.calls += 1
        return self.change(self.layer(self.dropout(self.norm(images))))


class Last(Gives):
    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__(lambda logits: logits, channels)
        self.last = layer

    def forward(self, images: Tensor) -> Tensor:
        return self.last(super().forward(images))


class Pooled(nn.Module):
    """Normalises one value a channel and image, as the pooling of DeepLab does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.layer(images)
        return logits + self.norm(logits.mean((2, 3), keepdim=True))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Gives(lambda z: (z, z)), "gives tuple of (2, 1, 16, 16), (2, 1, 16, 16) for images (2, 3, 16, 16)"),
        (Gives(lambda z: {"logits": z}), "gives dict of logits for images (2, 3, 16, 16)"),
        (Gives(lambda z: z[:, 0]), "gives (2, 16, 16) for images (2, 3, 16, 16), not logits (2, C, 16, 16); add the"),
        (Gives(lambda z: z[..., ::2, ::2]), "gives (2, 1, 8, 8) for images (2, 3, 16, 16)"),
        (Gives(lambda z: z.mean((2, 3))), "gives (2, 1) for"),
        (Gives(lambda z: z > 0), "gives bool for"),
        (Gives(lambda z: None), "gives NoneType for"),
        (Gives(lambda z: z.view(7)), "fails on images (2, 3, 16, 16): RuntimeError: shape '[7]' is invalid"),
        (Gives(torch.sigmoid), "gives probabilities, its last operation is Sigmoid"),
        (Gives(lambda z: z.softmax(1), 3), "gives probabilities, its last operation is Softmax"),
        (Last(nn.Sigmoid(), 1), "gives probabilities, its last operation is Sigmoid"),
        (Last(nn.Softmax(dim=1), 3), "gives probabilities, its last operation is Softmax"),
        (nn.Identity(), "has no parameters to train"),
    ],
)
def test_a_network_that_cannot_be_trained_is_one_line_with_the_shape(model: nn.Module, said: str) -> None:
    with pytest.raises(UserError) as raised:
        check_network(model, "own:Net", 16, 6)
    assert said in str(raised.value) and "\n" not in str(raised.value) and "model.name own:Net: " in str(raised.value)


def test_batch_norm_on_one_value_is_told_with_the_batch_size() -> None:
    with pytest.raises(UserError, match=r"more than 1 value per channel.*; set train\.batch_size"):
        check_network(Pooled(), "own:Net", 16, 1)
    check_network(Pooled(), "own:Net", 16, 2)


@pytest.mark.parametrize(("channels", "class_count"), [(1, 3), (4, 3), (3, 2), (2, 254)])
def test_logits_of_another_number_of_classes_are_told_with_the_key(channels: int, class_count: int) -> None:
    said = rf"logits of {channels} channels, and {class_count} classes need .*model\.options.*data\.classes"
    with pytest.raises(UserError, match=said) as raised:
        check_network(Gives(lambda z: z, channels), "own:Net", 16, 6, class_count)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("channels", "class_count"), [(1, 2), (2, 2), (3, 3), (254, 254)])
def test_two_classes_take_one_channel_or_two_and_more_one_each(channels: int, class_count: int) -> None:
    check_network(Gives(lambda z: z, channels), "own:Net", 16, 6, class_count)
    unet = build_model(model_config(width=4, depth=1), class_count=class_count)
    assert unet(torch.zeros(1, 3, 8, 8)).shape[1] == (1 if class_count == 2 else class_count)


def test_the_trial_changes_nothing() -> None:
    model, unet = Last(nn.LogSoftmax(dim=1), 3), UNet(width=4, depth=2)
    before, streams = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    check_network(model, "own:Net", 16, 6, class_count=3)
    check_network(unet, "unet", 16, 6)
    assert model.calls == 0 and model.training and not model._forward_hooks
    assert all(value.equal(model.state_dict()[name]) for name, value in before.items())
    assert torch.get_rng_state().equal(streams)
