"""A run whose network marks nothing on any validation image says so, with a mend that can be typed."""

import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest

from distseg.config.schema import Config
from distseg.training.trainer import Trainer

NOTHING, SOMETHING = np.array([[0, 0, 5, 95], [0, 0, 9, 91]]), np.array([[0, 0, 5, 95], [0, 1, 9, 90]])


def config_with(loss: str, **keys) -> Config:
    method = {"name": "finetune", "loss": {"kind": loss, **keys}}
    return Config.model_validate({"name": "x", "data": {"root": "."}, "method": method, "train": {"steps": 8}})


def said(caplog: pytest.LogCaptureFixture, loss: str, counts: np.ndarray, step: int) -> str:
    """What a run of eight steps logs when it validates after `step` of them."""
    trainer = SimpleNamespace(
        config=config_with(loss),
        steps=8,
        score=lambda samples: counts,
        splits=SimpleNamespace(val=()),
        runtime=SimpleNamespace(is_main=True),
        progress=SimpleNamespace(step=step, best_dice=-1.0, best_step=0),
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        Trainer._validate(trainer, SimpleNamespace(metrics=lambda *_: None))
    return caplog.text


@pytest.mark.parametrize("loss", ["cross_entropy", "t_loss", "dice_cross_entropy"])
def test_it_says_so_at_the_end_with_a_mend(caplog: pytest.LogCaptureFixture, loss: str) -> None:
    text = said(caplog, loss, NOTHING, step=8)
    assert "marks no pixel on any validation image" in text
    key, value = re.search(r"method\.(loss\S*)=(\S+)", text).groups()
    if loss == "dice_cross_entropy":
        assert (key, value) == ("loss.class_weights", "[1,20]")
        assert config_with(loss, class_weights=[1, 20]).method.loss.class_weights == (1.0, 20.0)
    else:
        assert (key, value) == ("loss", "dice_cross_entropy")
        assert config_with(value).method.loss.kind == value
    assert said(caplog, loss, SOMETHING, step=8) == ""
    assert said(caplog, loss, NOTHING, step=4) == ""
