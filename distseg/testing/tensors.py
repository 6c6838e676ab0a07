"""What torch does while a block runs: how many bytes of tensors are alive at most, and what travels between ranks."""

from collections.abc import Callable
from math import prod
from typing import Any

from torch import Tensor, UntypedStorage
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
        made = [tensor.untyped_storage() for tensor in tensors if self.counts(tensor)]
        fresh = [storage for storage in made if storage._cdata not in self._made]
        if fresh:
            alive = self._alive()  # without the dead, whose addresses may be in use again
            for storage in fresh:
                # Memory that another storage owns is counted there.
                if not any(own.data_ptr() <= storage.data_ptr() < own.data_ptr() + own.nbytes() for own in alive):
                    self._made[storage._cdata] = StorageWeakRef(storage)
            self.peak = max(self.peak, self.bytes())
        return result

    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._alive())

    def _alive(self) -> list[UntypedStorage]:
        found = {key: UntypedStorage._new_with_weak_ptr(reference.cdata) for key, reference in self._made.items()}
        alive = {key: storage for key, storage in found.items() if storage is not None}
        self._made = {key: self._made[key] for key in alive}
        return list(alive.values())


class Messages(TorchDispatchMode):
    """Records every collective within as (operator, elements that this rank puts in), in order."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::").strip("_")
            # `_allgather_base_(output, input, …)` and its kind have two, `allreduce_(tensors, …)` one.
            source = args[1] if name.endswith("_base") else args[0]
            self.sent.append((name, sum(prod(t.shape) for t in tree_leaves(source) if isinstance(t, Tensor))))
        return function(*args, **(kwargs or {}))
