"""What a checkpoint must have to be gone on from, beside files that are whole."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from distseg.errors import UserError
from distseg.training import checkpoint


def test_the_state_of_a_method_that_learns_other_things_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a version before: a label model whose sums have another shape."""
    monkeypatch.setattr(checkpoint, "_read_state", lambda path: None)
    monkeypatch.setattr(checkpoint, "load_module_state", lambda engine, state: None)
    save_file({}, tmp_path / "model.safetensors")
    save_file({"labels.fit": torch.zeros(2, 7)}, tmp_path / "method.safetensors")
    method = SimpleNamespace(state_dict=lambda: {"labels.fit": torch.zeros(11, 7)})
    runtime = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"whose method learns other things; start a new run with another name="):
        checkpoint.restore(tmp_path, None, method, runtime)
