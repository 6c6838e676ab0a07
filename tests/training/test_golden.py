"""A refactor that changes numbers shows: see golden.py."""

import json

import torch

from tests.training.golden import FILE, PRESETS, computed


def test_fifty_steps_of_five_presets_have_the_losses_of_before() -> None:
    expected = json.loads(FILE.read_text())
    actual = computed()
    assert expected.keys() == actual.keys() == set(PRESETS)
    for name, values in actual.items():
        assert len(values) == 50
        torch.testing.assert_close(
            values,
            torch.tensor(expected[name], dtype=torch.float64),
            rtol=0,
            atol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )
