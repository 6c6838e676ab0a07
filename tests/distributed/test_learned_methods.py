"""Invariant 3 for what methods learn beside the network: N ranks = 1 rank, and the same state on every rank."""

import torch
from torch import nn

from distseg.config.schema import Config
from distseg.data.streams import Batch
from distseg.distributed.collectives import sum_over_ranks
from distseg.meta.network import StatelessNetwork
from distseg.meta.placement import Whole
from distseg.meta.reduction import ByFunction
from distseg.meta.weight_net import WeightNet, hypergradient
from distseg.meta.weights import uniform_weights
from distseg.methods.config import MethodConfig
from distseg.methods.label_correction import LabelCorrection
from distseg.methods.step import Parts
from distseg.methods.t_loss import TLoss
from distseg.testing.ranks import run_ranks
from distseg.training.config import TrainConfig

CONFIG = Config.model_validate({"name": "x", "data": {"root": "."}, "train": {"steps": 1}, "optim": {"lr": 0.05}})


def batch(seed: int, count: int):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, 2, (count, 8, 8), generator=generator, dtype=torch.uint8)
    masks[0, :4] = 255  # the ranks hold unequal numbers of valid pixels
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64), masks


def learn(rank: int, world_size: int, total) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model, net = nn.Conv2d(3, 1, 3, padding=1).double(), WeightNet(8).double()
    share = slice(rank, None, world_size)
    noisy, clean = ([tuple(t[share] for t in batch(seed, 4))] for seed in (1, 2))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    hyper = hypergradient(StatelessNetwork(model, Whole(model)), parameters, net, noisy, clean, 0.3, ByFunction(total))
    out = {f"hypergradient.{i}": g for i, g in enumerate(hyper.by_parameter)}

    parts = Parts(CONFIG, (), (), 1, lambda *_: None, lambda _: None, total, torch.device("cpu"))
    method = TLoss(parts)
    for step in range(3):
        images, masks = (tensor[share] for tensor in batch(step, 4))
        [weights] = uniform_weights([masks], ByFunction(total), torch.float64)
        method.loss(images[:, :1], masks, weights.times(world_size))
        method.finish_step(0.05)
    return out | {f"t_loss.{name}": value for name, value in method.state_dict().items()}


def correct(rank: int, world_size: int, total) -> dict[str, torch.Tensor]:
    """Loss, counts and diagnostics of three steps, with corrected labels from the second on."""
    method_config = {"name": "label_correction", "warm_up": 0.25}
    config = CONFIG.model_copy(update={
        "method": MethodConfig.model_validate(method_config), "train": TrainConfig(steps=4, batch_size=4 // world_size)
    })  # fmt: skip

    class Drawn:
        def __init__(self, seed: int) -> None:
            self.seed = seed

        def batch(self, step: int, micro: int) -> Batch:
            images, masks = (tensor[rank::world_size] for tensor in batch(self.seed + step, 4))
            return Batch(images, masks, torch.where(masks == 255, 255, (images[:, 0] > 0).to(torch.uint8)), ())

    def open_stream(name: str, *_) -> Drawn:
        return Drawn({"noisy": 20, "clean": 30}[name])

    method = LabelCorrection(Parts(config, (), (), 4, open_stream, None, total, torch.device("cpu")))
    out = {}
    for step in range(3):
        [weighted], diagnostics = method.draw(step, diagnose=True)
        logits = 3 * weighted.batch.images[:, :1]
        out[f"{step}.loss"] = total(method.loss(logits, weighted.batch.masks, weighted.weights))
        method.finish_step(0.05)
        out |= {f"{step}.{name}": value for name, value in diagnostics.items()}
    return out | method.state_dict()


def correct_on_a_rank(runtime) -> dict[str, torch.Tensor]:
    return correct(runtime.shard.rank, runtime.shard.world_size, sum_over_ranks)


def test_two_ranks_correct_labels_as_one_does() -> None:
    expected = correct(0, 1, lambda tensor: tensor)
    for actual in run_ranks(correct_on_a_rank, 2):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-15)
    assert expected["2.corrected_noise_rate"] < 0.5 * expected["2.noise_rate"]


def learn_on_a_rank(runtime) -> dict[str, torch.Tensor]:
    return learn(runtime.shard.rank, runtime.shard.world_size, sum_over_ranks)


def test_two_ranks_learn_what_one_learns() -> None:
    expected = learn(0, 1, lambda tensor: tensor)
    ranks = run_ranks(learn_on_a_rank, 2)
    for name, value in expected.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-10, atol=1e-15)
    assert expected["t_loss.0.parameter"].item() != 0
