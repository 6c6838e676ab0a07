"""What a network keeps between forward passes: its buffers, which steps may have to restore, and state that gets lost.

Buffers are followed by name, since a module may write into one (`self.level.mul_(0.9)`) or assign a new tensor to its
name (`self.level = 0.9 * self.level`).
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distseg.distributed.batch_norm import SynchronisedBatchNorm
from distseg.errors import UserError


def share_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0, by name, so that what a checkpoint holds is what every rank goes on with.

    Those of synchronised batch normalisation are the same on every rank, and do not travel.
    """
    if dist.get_world_size() == 1:
        return
    for owner in module.modules():
        if not isinstance(owner, SynchronisedBatchNorm):
            for buffer in owner._buffers.values():
                if buffer is not None:
                    dist.broadcast(buffer, src=0)


class KeptBuffers:
    """A module's buffers as they were when this was made: before the passes of a step that may have to be undone."""

    def __init__(self, module: nn.Module) -> None:
        self._kept = [
            (owner, name, f"{prefix}.{name}" if prefix else name, buffer, buffer.detach().clone())
            for prefix, owner in module.named_modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def restore_where(self, skip: Tensor) -> None:
        """Give each buffer its kept value where `skip`, a boolean scalar on their device, is true.

        Nothing waits for the device, whatever `skip` is. Raises ValueError for a buffer that has been deleted or has
        changed its shape or dtype, between which the device cannot choose.
        """
        for owner, name, path, before, kept in self._kept:
            now = owner._buffers.get(name)
            if now is None or now.shape != kept.shape or now.dtype != kept.dtype:
                raise ValueError(f"the network's buffer {path} changes its shape or dtype in a forward pass: keep both")
            chosen = torch.where(skip, kept, now)
            if now is before:
                now.copy_(chosen)
            else:  # an assigned tensor may be a view of something else
                owner._buffers[name] = chosen


def refuse_unsaved_state(model: nn.Module, images: Tensor) -> None:
    """Raise UserError if later passes of `model` read what an earlier pass left outside of its persistent buffers.

    Checkpoints do not hold such state, and the meta pass, which runs on a twin of the model, does not see it. Found by
    two passes of a copy over `images` (B, 3, H, W); a cache that the second one finds filled is no such state, nor is
    an attribute that each pass writes before it reads it. The model, its mode and the random streams are left alone.
    """
    trial = copy.deepcopy(model)
    persistent = trial.state_dict().keys()
    shapes = {name: (buffer.shape, buffer.dtype) for name, buffer in trial.named_buffers(remove_duplicate=False)}
    with torch.no_grad(), torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        trial(images)
        before = dict(_attributes(trial))
        buffers = {name: buffer.clone() for name, buffer in trial.named_buffers(remove_duplicate=False)}
        with _AttributeReads(trial) as reads:
            trial(images)
    after = dict(_attributes(trial))
    for path, value in after.items():
        if path in reads.before_written and value != before.get(path):
            raise UserError(
                f"model.name: the network's attribute {path} changes in a forward pass and is read by the next, but is "
                f"in no checkpoint; make it a buffer: register_buffer({path.rpartition('.')[2]!r}, torch.tensor(…))"
            )
    for path, buffer in trial.named_buffers(remove_duplicate=False):
        if shapes.get(path) != (buffer.shape, buffer.dtype):
            raise UserError(
                f"model.name: the network's buffer {path} gets its shape or dtype in a forward pass; give it both in "
                "__init__"
            )
        if path not in persistent and not torch.equal(buffer, buffers[path]):
            raise UserError(
                f"model.name: the network's buffer {path} changes in a forward pass, but is in no checkpoint; register "
                "it with persistent=True"
            )


_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes of a module that are torch's own: parameters, buffers, children, hooks, the mode."""


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and content of every plain attribute of every module; contents compare equal if nothing has changed."""
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _OF_TORCH:
                yield f"{prefix}.{name}" if prefix else name, _content(value, set())


def _content(value: Any, inside: set[int]) -> Any:
    """Something that compares equal as long as `value` holds the same, and holds no reference into it."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.Size | torch.dtype):
        return repr(value)  # by their text, NaN equals itself
    if isinstance(value, Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    if id(value) in inside or isinstance(value, nn.Module | type) or callable(value):
        return id(value)
    inside = inside | {id(value)}
    if isinstance(value, dict):
        return [(repr(key), _content(item, inside)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_content(item, inside) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return id(value), [(key, _content(item, inside)) for key, item in getattr(value, "__dict__", {}).items()]


class _AttributeReads:
    """Within, notes which attributes of a model's modules are read before they are written, by path."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, prefix, type(module)) for prefix, module in model.named_modules()]
        self.before_written: set[str] = set()
        self._written: set[str] = set()

    def __enter__(self) -> "_AttributeReads":
        for module, prefix, kind in self._modules:
            module.__class__ = self._noting(kind, f"{prefix}." if prefix else "")
        return self

    def __exit__(self, *_: object) -> None:
        for module, _, kind in self._modules:
            module.__class__ = kind

    def _noting(self, kind: type[nn.Module], prefix: str) -> type[nn.Module]:
        written, before_written = self._written, self.before_written

        def read(module: nn.Module, name: str) -> Any:
            if prefix + name not in written:
                before_written.add(prefix + name)
            return kind.__getattribute__(module, name)

        def write(module: nn.Module, name: str, value: Any) -> None:
            written.add(prefix + name)
            kind.__setattr__(module, name, value)

        return type(kind.__name__, (kind,), {"__getattribute__": read, "__setattr__": write})
