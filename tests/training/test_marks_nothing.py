"""A run whose network marks nothing on any validation image says so, with a mend that can be typed."""

import logging
import re

import numpy as np
import pytest

from distseg.config.schema import Config
from distseg.training.trainer import warn_if_nothing_is_marked

NOTHING, SOMETHING = np.array([[0, 0, 5, 95], [0, 0, 9, 91]]), np.array([[0, 0, 5, 95], [0, 1, 9, 90]])


def config_with(loss: str, classes: dict[str, int] | None = None, **keys) -> Config:
    method = {"name": "finetune", "loss": {"kind": loss, **keys}}
    return Config.model_validate(
        {"name": "x", "data": {"root": ".", "classes": classes}, "method": method, "train": {"steps": 8}}
    )


def said(caplog: pytest.LogCaptureFixture, loss: str, counts: np.ndarray) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_if_nothing_is_marked(counts, config_with(loss))
    return caplog.text


@pytest.mark.parametrize("loss", ["cross_entropy", "t_loss", "dice_cross_entropy"])
def test_it_says_so_with_a_mend(caplog: pytest.LogCaptureFixture, loss: str) -> None:
    text = said(caplog, loss, NOTHING)
    assert "marks no pixel on any validation image" in text
    key, value = re.search(r"method\.(loss\S*)=(\S+)", text).groups()
    if loss == "dice_cross_entropy":
        assert (key, value) == ("loss.class_weights", "[1,20]")
        assert config_with(loss, class_weights=[1, 20]).method.loss.class_weights == (1.0, 20.0)
    else:
        assert (key, value) == ("loss", "dice_cross_entropy")
        assert config_with(value).method.loss.kind == value
    assert said(caplog, loss, SOMETHING) == ""


def test_of_several_classes_those_that_are_marked_nowhere_are_named(caplog: pytest.LogCaptureFixture) -> None:
    config = config_with("dice_cross_entropy", {"skin": 0, "lesion": 1, "hair": 2})
    counts = np.array([[[3, 0, 1, 6], [0, 0, 4, 6]], [[0, 2, 0, 8], [0, 0, 0, 10]]])
    with caplog.at_level(logging.WARNING):
        warn_if_nothing_is_marked(counts, config)
    assert "marks no pixel as hair on any" in caplog.text
    assert "method.loss.class_weights=[1,20,20]" in caplog.text
