import logging

import pytest
import torch

from distseg.config.schema import Config
from distseg.training.trainer import warn_if_bits_may_differ


@pytest.mark.parametrize(("device", "deterministic", "warns"), [("cuda", 0, 1), ("cuda", 1, 0), ("cpu", 0, 0)])
def test_a_resumed_run_on_a_gpu_says_that_it_may_differ(
    device: str, deterministic: int, warns: int, caplog: pytest.LogCaptureFixture
) -> None:
    train = {"steps": 1, "deterministic": bool(deterministic)}
    config = Config.model_validate({"name": "x", "data": {"root": "."}, "train": train})
    with caplog.at_level(logging.WARNING):
        warn_if_bits_may_differ(config, torch.device(device))
    assert ("train.deterministic=false" in caplog.text) == bool(warns)
