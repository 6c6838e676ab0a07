"""Parameters and buffers from another network: those that fit by name and shape, and no others."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distseg.errors import UserError
from distseg.text import for_terminal

_SHOWN = 4


@dataclass(frozen=True)
class Taken:
    """By the network's names."""

    taken: tuple[str, ...]
    other_shape: tuple[str, ...]
    """As `head.weight (1, 8, 1, 1) there, (3, 8, 1, 1) here`."""
    absent: tuple[str, ...]
    """What the source has not."""
    unused: tuple[str, ...]
    """What the source alone has, by its own names."""

    def __str__(self) -> str:
        parts = [f"{len(self.taken)} tensors taken"]
        for names, what in (
            (self.other_shape, "of another shape"),
            (self.absent, "not there, kept as drawn"),
            (self.unused, "there alone"),
        ):
            if names:
                more = ", …" if len(names) > _SHOWN else ""
                parts.append(f"{len(names)} {what}: {for_terminal(', '.join(names[:_SHOWN]))}{more}")
        return "; ".join(parts)


def take_tensors(network: nn.Module, source: Mapping[str, Tensor]) -> Taken:
    """Copy into `network` the tensors of `source` that have the name and shape of one of its own.

    Where the names of one side are those of the other behind a prefix (an encoder's inside of a network, `module.` of a
    wrapper), the prefix that fits most of them is added or taken off. Raises UserError where no weight fits; a bias of
    one number fits anywhere.
    """
    own = network.state_dict()
    named = _renamed(source, own)
    fitting = {name: tensor for name, tensor in named.items() if name in own and own[name].shape == tensor.shape}
    weights = {name for name, parameter in network.named_parameters() if parameter.ndim > 1}
    if not weights & fitting.keys():
        raise UserError(
            f"none of its {len(source)} tensors has the name and shape of one of the network's {len(own)}: it is of "
            "another architecture; take a run of the same model.name, width and norm"
        )
    with torch.no_grad():
        for name, tensor in fitting.items():
            own[name].copy_(tensor)
    shapes = tuple(
        f"{name} {tuple(named[name].shape)} there, {tuple(own[name].shape)} here"
        for name in own
        if name in named and name not in fitting
    )
    unused = tuple(old for old, new in zip(source, named, strict=True) if new not in own)
    taken = tuple(name for name in own if name in fitting)
    return Taken(taken, shapes, tuple(name for name in own if name not in named), unused)


def _renamed(source: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`source` under the names that fit most of `own`, in the same order."""

    def fits(names: Iterable[str]) -> int:
        pairs = zip(names, source.values(), strict=True)
        return sum(name in own and own[name].shape == tensor.shape for name, tensor in pairs)

    added = sorted({name[: -len(given)] for name in own for given in source if name.endswith(f".{given}")})
    removed = sorted({given[: -len(name)] for name in own for given in source if given.endswith(f".{name}")})
    choices = [list(source)]
    choices += [[prefix + given for given in source] for prefix in added]
    choices += [[given.removeprefix(prefix) for given in source] for prefix in removed]
    distinct = [names for names in choices if len(set(names)) == len(names)]
    return dict(zip(max(distinct, key=fits), source.values(), strict=True))
