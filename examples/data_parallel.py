"""Weights under DistributedDataParallel, without DeepSpeed: one global batch over all ranks.

    torchrun --nproc-per-node 2 examples/data_parallel.py

Each rank holds its share of the noisy and of the clean batch. The weights sum to 1 over the noisy images of all ranks,
so any number of ranks takes the same steps: with `--nproc-per-node 1` the printed losses are the same.
"""

import os
import sys

import torch
import torch.distributed as dist
from drawn import lesions
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from distseg import PixelReweighter, weighted_loss
from distseg.models.unet import UNet

STEPS = 10


def sum_over_ranks(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_default_dtype(torch.float64)  # in float32 the last digits would differ by rounding
    rank, ranks = dist.get_rank(), dist.get_world_size()
    images, _, triangles = lesions(8, seed=1)
    clean_images, clean_masks, _ = lesions(8, seed=2)
    images, triangles = images[rank::ranks].double(), triangles[rank::ranks]
    clean_images, clean_masks = clean_images[rank::ranks].double(), clean_masks[rank::ranks]

    torch.manual_seed(0)
    model = UNet(width=4, depth=2, norm="group")
    parallel = DistributedDataParallel(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    # The reweighter takes the network itself: the meta pass must not set off DistributedDataParallel's hooks.
    reweighter = PixelReweighter(model, sum_over_ranks=sum_over_ranks)
    for step in range(STEPS):
        weights = reweighter(images, triangles, clean_images, clean_masks)
        loss = weighted_loss(parallel(images), triangles, weights)
        optimiser.zero_grad()
        # DistributedDataParallel averages the ranks' gradients; the loss is a sum over them.
        (ranks * loss).backward()
        optimiser.step()
        total = sum_over_ranks(loss.detach())
        if rank == 0:
            print(f"step {step}  loss {total.item():.8f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    if int(os.environ["WORLD_SIZE"]) > 1:
        # A thread of gloo's may outlive its group, and abort where it meets an interpreter that is being taken apart.
        sys.stdout.flush()
        os._exit(0)
