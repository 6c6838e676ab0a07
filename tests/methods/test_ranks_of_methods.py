"""Invariant 3 for what methods learn beside the network: N ranks = 1 rank, and the same state on every rank."""

import torch
from torch import nn

from distseg.data.batch import Batch
from distseg.distributed.collectives import sum_over_ranks
from distseg.meta.network import StatelessNetwork
from distseg.meta.placement import Whole
from distseg.meta.reduction import ByFunction
from distseg.meta.weight_net import WeightNet, hypergradient
from distseg.meta.weights import uniform_weights
from distseg.methods.config import MethodConfig
from distseg.methods.context import Context
from distseg.methods.losses.t_loss import TLoss
from distseg.methods.method import build_method
from distseg.methods.step import MicroBatch, Step
from distseg.testing.ranks import run_ranks

NO = torch.tensor(False)


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

    loss = TLoss(torch.device("cpu"))
    for index in range(3):
        images, masks = (tensor[share] for tensor in batch(index, 4))
        [weights] = uniform_weights([masks], ByFunction(total), torch.float64)
        step = Step([MicroBatch(Batch(images, masks, masks, ()), weights)], loss, ByFunction(total))
        step.loss(0, images[:, :1], scale=world_size)
        step.finish(NO, 0.05)
    return out | {f"t_loss.{name}": value for name, value in loss.state_dict().items()}


def correct(rank: int, world_size: int, total, annotators: int | None = None) -> dict[str, torch.Tensor]:
    """Loss, state and diagnostics of four steps: a warm-up, one that calibrates and decides, and two that correct.

    annotators: so many, of whom two or three have drawn each image; None: a mask an image.
    """

    class Drawn:
        def __init__(self, seed: int, clean: bool) -> None:
            self.seed, self.clean = seed, clean

        def batch(self, step: int, micro: int) -> Batch:
            images, masks = (tensor[rank::world_size] for tensor in batch(self.seed + step, 4))
            truth = torch.where(masks == 255, 255, (images[:, 0] > 0).to(torch.uint8))
            every = drawn_by(annotators, self.seed + step, truth, rank, world_size) if annotators else ()
            return Batch(images, truth if self.clean else masks, truth, ("",) * len(masks), *every)

    network = nn.Conv2d(3, 1, 1).double()
    with torch.no_grad():
        network.weight.copy_(torch.tensor([3.0, 1.0, 0.0]).view(1, 3, 1, 1))
        network.bias.fill_(-1)
    context = Context(
        noisy=(),
        clean=(),
        steps=4,
        batch_size=4 // world_size,
        clean_batch_size=4 // world_size,
        accumulation=1,
        seed=0,
        open_stream=lambda name, *_: Drawn({"noisy": 20, "clean": 30, "held_out": 40}[name], name != "noisy"),
        model=network,
        placement=Whole(network),
        reduction=ByFunction(total),
        device=torch.device("cpu"),
        annotators=annotators,
    )
    config = MethodConfig.model_validate(
        {"name": "label_correction", "warm_up": 0.25, "held_out": 0.5, "least_gain": -1}
    )
    method = build_method(config, context)
    out = {}
    for index in range(4):
        step = method.begin(index, diagnose=True)
        [micro] = step.micro_batches
        out[f"{index}.loss"] = total(step.loss(0, network(micro.batch.images).detach()))
        out |= {f"{index}.{name}": value for name, value in step.finish(NO, 0.05).items()}
    return out | method.state_dict()


def drawn_by(annotators: int, seed: int, truth: torch.Tensor, rank: int, world_size: int) -> tuple:
    """Annotations and annotators of this rank's images, right at four of five pixels."""
    generator = torch.Generator().manual_seed(seed)
    whole = (len(truth) * world_size, 3)
    who = torch.stack([torch.randperm(annotators, generator=generator)[:3] for _ in range(whole[0])])
    who[1, 2] = -1
    errs = torch.rand((*whole, 8, 8), generator=generator) < 0.2
    own, errs = who[rank::world_size], errs[rank::world_size]
    right = torch.where(truth == 255, 0, truth)[:, None]
    return torch.where((own < 0)[:, :, None, None], 255, torch.where(errs, 1 - right, right)).to(torch.uint8), own


def correct_by_several_on_a_rank(runtime) -> dict[str, torch.Tensor]:
    return correct(runtime.shard.rank, runtime.shard.world_size, sum_over_ranks, annotators=4)


def correct_on_a_rank(runtime) -> dict[str, torch.Tensor]:
    return correct(runtime.shard.rank, runtime.shard.world_size, sum_over_ranks)


def test_two_ranks_correct_labels_as_one_does() -> None:
    expected = correct(0, 1, lambda tensor: tensor)
    for actual in run_ranks(correct_on_a_rank, 2):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-15)
    assert expected["1.labels/corrects"] == 1 and expected["labels.known"] == 2
    assert expected["2.corrected_noise_rate"] < 0.8 * expected["2.noise_rate"]


def test_two_ranks_combine_annotators_as_one_does() -> None:
    expected = correct(0, 1, lambda tensor: tensor, annotators=4)
    for actual in run_ranks(correct_by_several_on_a_rank, 2):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-13)
    assert expected["1.labels/corrects"] == 1 and expected["labels.known"] == 2
    assert expected["2.corrected_noise_rate"] < 0.8 * expected["2.noise_rate"]
    assert expected["labels.theta"][1] > 0


def learn_on_a_rank(runtime) -> dict[str, torch.Tensor]:
    return learn(runtime.shard.rank, runtime.shard.world_size, sum_over_ranks)


def test_two_ranks_learn_what_one_learns() -> None:
    expected = learn(0, 1, lambda tensor: tensor)
    ranks = run_ranks(learn_on_a_rank, 2)
    for name, value in expected.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-10, atol=1e-15)
    assert expected["t_loss.log_nu.parameter"].item() != 0
