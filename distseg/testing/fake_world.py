"""One rank of a world that is not there: its collectives are counted and carry nothing, its tensors may be empty.

    with fake_rank(0, 512), without_elements(), Messages() as messages:
        …one real step of DeepSpeed and distseg…

`fake_rank` is torch's fake process group, on which DeepSpeed runs as it is: every collective returns at once and leaves
its output as it was, so that shapes, bytes, number and order are those of the rank in a real world, and values are
not. `without_elements` is torch's fake tensors (the meta device under the name of the CPU): a network of any size takes
no memory. DeepSpeed keeps facts about its first world for as long as the process lives: one world a process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from distseg.distributed.runtime import RENDEZVOUS


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """Within, the default process group says that this is `rank` of `world_size`, and no other process is needed."""
    # DeepSpeed reads them and, without them, looks for MPI. Nobody listens on the port.
    named = dict(zip(RENDEZVOUS, (rank, world_size, rank % 8, "127.0.0.1", 1), strict=True))
    with patch.dict(os.environ, {name: str(value) for name, value in named.items()} | {"DS_ACCELERATOR": "cpu"}):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=dist.HashStore())
        try:
            with _Zeroed():
                yield
        finally:
            dist.destroy_process_group()


class _Zeroed(TorchDispatchMode):
    """New memory holds zeros: a collective leaves it as it is, and what lay there before may be no finite number."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in _EMPTY and not isinstance(result, FakeTensor):
            result.zero_()
        return result


_EMPTY = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}


@contextmanager
def without_elements() -> Iterator[None]:
    """Within, new tensors have shape, dtype and a storage of the right size, and no elements.

    What the host reads of one is 1.0, 0 or False, so that norms are finite and nothing overflows; integers that Python
    made are real, because ranks compare lists of them.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def of_its_own(tensor: Tensor) -> Tensor:
        # What `from_dlpack` is used for: other storage, same memory. No operator made it, so nobody counts it.
        with _disable_current_modes():
            return FakeTensor(mode, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), tensor.device)

    # `module.to` would swap fake parameters, which a twin shares, for others; they are where they belong.
    in_place = patch.object(nn.Module, "to", lambda module, *_, **__: module)
    with patch.object(torch, "from_dlpack", of_its_own), in_place, mode, _ReadByTheHost():
        yield


class _ReadByTheHost(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if function is aten.lift_fresh.default and not args[0].is_floating_point():
            return args[0]  # of torch.tensor(…): stays real
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if function is aten.equal.default:
            return True
        try:
            return function(*args, **kwargs)
        except DataDependentOutputException:
            return 1.0 if args[0].is_floating_point() else False if args[0].dtype == torch.bool else 0
