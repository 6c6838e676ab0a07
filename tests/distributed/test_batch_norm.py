"""Synchronised batch normalisation on one rank beside torch's, and which modules become one."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from distseg.distributed.batch_norm import SynchronisedBatchNorm, synchronise_batch_norm
from distseg.testing.ranks import run_ranks

VARIANTS = {
    "plain": {},
    "momentum": {"momentum": 0.3, "eps": 1e-2},
    "cumulative": {"momentum": None},
    "not affine": {"affine": False},
    "untracked": {"track_running_stats": False},
}


def beside_torch(runtime) -> dict[str, Tensor]:
    """Differences from torch's module: outputs in both modes, derivatives of both orders and modes, statistics."""
    errors = {}
    for name, options in VARIANTS.items():
        torch.manual_seed(0)
        torchs = nn.BatchNorm2d(5, **options).double()
        for parameter in torchs.parameters():
            nn.init.uniform_(parameter, 0.5, 2)
        ours = synchronise_batch_norm(copy.deepcopy(torchs))
        assert isinstance(ours, SynchronisedBatchNorm) and ours.state_dict().keys() == torchs.state_dict().keys()
        # A mean that is large beside the deviation takes digits from whoever subtracts squares.
        values = torch.randn(3, 5, 4, 6, dtype=torch.float64) + 1e3 * torch.arange(5.0).view(-1, 1, 1)
        for step in range(3):
            ours(values + step), torchs(values + step)
        errors |= {f"{name} {key}": ours.state_dict()[key] - value for key, value in torchs.state_dict().items()}
        single = (copy.deepcopy(module).float()(values.float()) for module in (ours, torchs))
        errors[f"{name} float32"] = next(single) - next(single)

        def run(theta, x, module):
            buffers = {key: buffer.clone() for key, buffer in module.named_buffers()}
            return functional_call(module, (theta, buffers), (x,)).sin()

        results = []
        for module in (ours, torchs):
            leaves = {key: p.detach().requires_grad_() for key, p in module.named_parameters()} | {"x": values.clone()}
            leaf = leaves.pop("x").requires_grad_()
            inputs = [leaf, *leaves.values()]
            torch.manual_seed(1)
            output = run(leaves, leaf, module)
            first = torch.autograd.grad((output * torch.randn_like(output)).sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
            tangents = {key: torch.randn_like(p) for key, p in leaves.items()}, torch.randn_like(leaf)
            primals = {key: p.detach() for key, p in leaves.items()}, leaf.detach()
            _, jvp = torch.func.jvp(lambda t, x, module=module: run(t, x, module), primals, tangents)
            module.eval()
            results.append([output, *first, *second, jvp, module(values)])
        for index, (actual, expected) in enumerate(zip(*results, strict=True)):
            scale = expected.detach().abs().max().clamp(min=1e-3)
            errors[f"{name} result {index}"] = (actual - expected).detach() / scale
    return {name: error.abs().max().double().reshape(1) for name, error in errors.items()}


def test_one_rank_computes_what_torch_does() -> None:
    [errors] = run_ranks(beside_torch, 1)
    wrong = {
        name: error.item()
        for name, error in errors.items()
        # 4·10³ in float32 is known to 2⁻¹², and a result that sin folds keeps fewer digits than it was made of.
        if not error < (2e-3 if name.endswith("float32") else 1e-9)
    }
    assert not wrong


class Custom(nn.BatchNorm2d):
    pass


def test_only_torchs_modules_are_replaced_and_keep_what_they_have() -> None:
    norm = nn.BatchNorm2d(3, eps=1e-2)
    norm.weight.requires_grad_(False)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm, nn.BatchNorm1d(3).eval()), "c": Custom(3)})
    before = dict(model.state_dict(keep_vars=True))
    converted = synchronise_batch_norm(model)
    assert converted is model
    assert isinstance(model["a"], SynchronisedBatchNorm) and model["a"].eps == 1e-2 and model["a"].training
    assert model["b"][0] is model["a"]
    assert isinstance(model["b"][1], SynchronisedBatchNorm) and not model["b"][1].training
    assert type(model["c"]) is Custom
    assert all(tensor is before[key] for key, tensor in model.state_dict(keep_vars=True).items())


def test_the_wrong_number_of_channels_is_told() -> None:
    with pytest.raises(ValueError, match="of 4 channels was given"):
        SynchronisedBatchNorm(4)(torch.randn(2, 3, 5, 5))
