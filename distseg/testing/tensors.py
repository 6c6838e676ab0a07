"""What torch does while a block runs: how many bytes of tensors are alive at most, and what travels between ranks."""

import sys
from collections.abc import Callable
from math import prod
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AliveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operators made within, as long as anything refers to them.

    counts: which tensors to count, by what their maker returned; by default all. `bytes()` is what is alive now, `peak`
    the most after any operator. What an operator allocates and frees inside itself is not seen.
    """

    def __init__(self, counts: Callable[[Tensor], bool] = lambda tensor: True) -> None:
        super().__init__()
        self.counts = counts
        self.peak = 0
        self._made: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        tensors = [tensor for tensor in tensors if _takes_memory(tensor) and self.counts(tensor)]
        made = [(tensor.untyped_storage(), isinstance(tensor, FakeTensor)) for tensor in tensors]
        fresh = {storage._cdata: (storage, fake) for storage, fake in made if storage._cdata not in self._made}
        if fresh:
            alive = self._alive()  # without the dead, whose addresses may be in use again
            now = sum(storage.nbytes() for storage in alive)
            for storage, fake in fresh.values():
                # Memory that another storage owns is counted there; that of a fake tensor is nowhere.
                if fake or not any(_holds(own, storage) for own in alive):
                    self._made[storage._cdata] = StorageWeakRef(storage)
                    now += storage.nbytes()
            self.peak = max(self.peak, now)
        return result

    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._alive())

    def _alive(self) -> list[UntypedStorage]:
        found = {key: UntypedStorage._new_with_weak_ptr(reference.cdata) for key, reference in self._made.items()}
        alive = {key: storage for key, storage in found.items() if storage is not None}
        self._made = {key: self._made[key] for key in alive}
        return list(alive.values())


def _takes_memory(tensor: Tensor) -> bool:
    return not (tensor._is_zerotensor() or tensor.device.type == "meta")


def _holds(own: UntypedStorage, other: UntypedStorage) -> bool:
    """Whether `other` begins in the memory of `own`."""
    return own.data_ptr() <= other.data_ptr() < own.data_ptr() + own.nbytes()


class Message(NamedTuple):
    operator: str
    """Of c10d: `allreduce`, `allgather_base`, `reduce_scatter_base`, `broadcast`, …"""
    elements: int
    """That this rank puts in."""
    size: int
    """Their bytes."""
    asker: str
    """The package on whose behalf it runs: `distseg` or `deepspeed`."""


class Messages(TorchDispatchMode):
    """Records every collective within, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    @property
    def sent(self) -> list[tuple[str, int]]:
        """Operator and elements of each."""
        return [(message.operator, message.elements) for message in self.messages]

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::").strip("_")
            # `_allgather_base_(output, input, …)` and its kind have two, `allreduce_(tensors, …)` one.
            source = args[1] if name.endswith("_base") else args[0]
            tensors = [tensor for tensor in tree_leaves(source) if isinstance(tensor, Tensor)]
            elements = sum(prod(tensor.shape) for tensor in tensors)
            size = sum(prod(tensor.shape) * tensor.element_size() for tensor in tensors)
            self.messages.append(Message(name, elements, size, _asker()))
        return function(*args, **(kwargs or {}))


def _asker() -> str:
    """The innermost of the two packages on the stack."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        package = module.partition(".")[0]
        if package in ("distseg", "deepspeed") and not module.startswith("distseg.testing"):
            return package
        frame = frame.f_back
    return "other"
