"""A network whose parameters lie in shards over the ranks, each gathered for the operators that meet it and no longer.

A module is run with a *stand-in* for each parameter, which has its shape and dtype and none of its elements. An
operator that is handed one gets the gathered tensor in its place, so where a parameter is used does not matter: by its
own module, by another one, by several, or not at all. In forward mode the tangent's shards are gathered with it.

In reverse mode autograd saves what an operator will need again. `saving_shards` makes it save the shard of a gathered
tensor and gather anew when the time comes, also for the graph of a backward pass that is itself differentiated.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map_only

from distseg.distributed.differentiable import Gather, gather, shard_range


class Shard(NamedTuple):
    elements: Tensor
    """(n,) this rank's run of the flattened parameter, see `distseg.distributed.differentiable`."""
    shape: torch.Size
    """Of the whole parameter."""
    trainable: bool


def cut(parameter: nn.Parameter) -> Shard:
    """This rank's shard of a parameter that every rank holds; a copy."""
    own = shard_range(parameter.numel(), dist.get_rank(), dist.get_world_size())
    elements = parameter.detach().contiguous().view(-1)[own.start : own.stop].clone()
    return Shard(elements, parameter.shape, parameter.requires_grad)


class ShardedParameters:
    """The parameters of one module by name, sharded; a placement as `distseg.meta` understands it.

    `read` returns them as they are at the moment. Every rank must run the module equally often.
    """

    sharded = True

    def __init__(self, read: Callable[[], Mapping[str, Shard]]) -> None:
        self._read = read
        self._gathered = _GatheredTensors()

    def trainable(self) -> dict[str, Tensor]:
        """This rank's shards (n,) of the parameters that are trained."""
        return {name: shard.elements.detach() for name, shard in self._read().items() if shard.trainable}

    def operands(self, trainable: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What to run the module with, given other shards of the trained parameters; the frozen ones are as read."""
        return {
            name: _StandIn(trainable[name] if shard.trainable else shard.elements.detach(), shard, self._gathered)
            for name, shard in self._read().items()
        }

    @contextmanager
    def saving_shards(self) -> Iterator[None]:
        """Within, autograd saves shards where operators would have it save gathered tensors."""
        with torch.autograd.graph.saved_tensors_hooks(self._gathered.pack, self._gathered.unpack):
            yield


class _StandIn(Tensor):
    """Has the metadata of a parameter and stands where a module expects one; operators get the gathered tensor."""

    _elements: Tensor
    _shape: torch.Size
    _gathered: "_GatheredTensors"

    def __new__(cls, elements: Tensor, shard: Shard, gathered: "_GatheredTensors") -> "_StandIn":
        # Made of the shard as read, because forward mode would wrap one made of `elements`.
        stand_in = Tensor._make_wrapper_subclass(
            cls, shard.shape, dtype=shard.elements.dtype, device=shard.elements.device
        )
        stand_in._elements, stand_in._shape, stand_in._gathered = elements, shard.shape, gathered
        return stand_in

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        args, kwargs = tree_map_only(_StandIn, _StandIn._whole, (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks the function
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        raise RuntimeError(f"{function} was handed the place of a sharded parameter, which has no elements")

    def _whole(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            whole = Gather.apply(self._elements, self._shape)
            if torch.is_grad_enabled() and not torch._C._functorch.is_functorch_wrapped_tensor(whole):
                self._gathered.remember(whole, self._elements.detach(), self._shape)
        return whole


_METADATA = frozenset(
    [getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda")]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.get_device]
)


class _Saved(NamedTuple):
    """A view of a gathered tensor, as autograd keeps it until the backward pass."""

    elements: Tensor
    shape: torch.Size
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _GatheredTensors:
    """Which storages that are alive hold gathered tensors, and of which shards."""

    def __init__(self) -> None:
        # A weak reference keeps the storage's identity, not its memory, from being used again.
        self._known: dict[int, tuple[StorageWeakRef, Tensor, torch.Size]] = {}

    def remember(self, whole: Tensor, elements: Tensor, shape: torch.Size) -> None:
        self._known = {key: entry for key, entry in self._known.items() if not entry[0].expired()}
        storage = whole.untyped_storage()
        self._known[storage._cdata] = StorageWeakRef(storage), elements, shape

    def pack(self, tensor: Tensor) -> Tensor | _Saved:
        entry = self._known.get(tensor.untyped_storage()._cdata)
        if entry is None:
            return tensor
        return _Saved(*entry[1:], tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, saved: Tensor | _Saved) -> Tensor:
        if not isinstance(saved, _Saved):
            return saved
        with torch.no_grad():  # autograd puts the tensor back into its place in the graph
            whole = gather(saved.elements, saved.shape)
        self.remember(whole, saved.elements, saved.shape)
        return whole.as_strided(saved.size, saved.stride, saved.offset)
