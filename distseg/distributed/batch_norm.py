"""Batch normalisation over the batches of all ranks, with the double backward and the forward mode of the meta pass.

torch's SyncBatchNorm has neither a double backward nor a forward mode, nor a CPU.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distseg.distributed.differentiable import Gather


class SynchronisedBatchNorm(_BatchNorm):
    """(B, C, …) → the same shape, normalised in training by the mean and variance of all ranks' batches together.

    N ranks compute what torch's BatchNorm computes on the concatenated batch: outputs, derivatives and running
    statistics, which are the same on every rank, bit for bit. Ranks may hold unequal numbers of values. In evaluation
    it is torch's own. A micro-batch is normalised by itself, so that accumulation is not one large batch here.

    One collective: every rank's mean, sum of squared deviations and count, combined as Chan, Golub and LeVeque (1983)
    do, which loses no digits where the mean is large beside the deviation.
    """

    def forward(self, values: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(values)
        self._check_input_dim(values)
        wide = values if values.dtype == torch.float64 else values.float()
        mean, variance, count = _moments_of_all_ranks(wide)
        if self.training and self.running_mean is not None:
            self._track(mean.detach(), variance.detach(), count.detach())
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        per_channel = (-1, *[1] * (values.ndim - 2))
        normalised = (wide - mean.view(per_channel)) * scale.view(per_channel)
        if self.bias is not None:
            normalised = normalised + self.bias.view(per_channel)
        return normalised.to(values.dtype)

    def _check_input_dim(self, values: Tensor) -> None:
        if values.ndim < 2 or values.shape[1] != self.num_features:
            raise ValueError(f"batch norm of {self.num_features} channels was given {tuple(values.shape)}")

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.num_batches_tracked is not None, "running_mean is there, and so is the count"
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked.to(mean.dtype) if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1))
        for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            if running is not None:
                running.add_(momentum * (value - running))


def _moments_of_all_ranks(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), variance (C,) and number () of the values of each channel over all ranks."""
    channels = values.shape[1]
    own_count = values.numel() // channels
    own_variance, own_mean = torch.var_mean(values, [d for d in range(values.ndim) if d != 1], correction=0)
    own = torch.cat([own_mean, own_variance * own_count, own_mean.new_full((1,), own_count)])
    means, squares, counts = Gather.apply(own, (dist.get_world_size(), len(own))).split([channels, channels, 1], dim=1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    variance = (squares + counts * (means - mean).square()).sum(0) / count
    return mean, variance, count


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """`model` with a SynchronisedBatchNorm in the place of each of torch's, in which it keeps parameters and buffers.

    Subclasses of torch's, which may compute something else, are left as they are. Do it before `shadow_of`.
    """
    torchs = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    synchronised = {id(m): _synchronised(m) for m in model.modules() if isinstance(m, _BatchNorm) and type(m) in torchs}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            module._modules[name] = synchronised.get(id(child), child)
    return synchronised.get(id(model), model)


def _synchronised(module: _BatchNorm) -> SynchronisedBatchNorm:
    twin = SynchronisedBatchNorm(
        module.num_features,
        eps=module.eps,
        momentum=module.momentum,
        affine=module.affine,
        track_running_stats=module.track_running_stats,
        device="meta",
    )
    twin._parameters.update(module._parameters)
    twin._buffers.update(module._buffers)
    return twin.train(module.training)
