"""A network by the name that the config gives it.

`model.name=package.module:callable` names an nn.Module class, or a function that returns one and says so: by its
return annotation, or, where it has none, by an attribute `returns_module = True`. Nothing else is called.
"""

import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distseg.errors import UserError
from distseg.models.config import ImportedConfig, UNetConfig
from distseg.models.unet import UNet

DECLARATION = "returns_module"


def output_count(class_count: int) -> int:
    """Channels of the logits: two classes have one."""
    return 1 if class_count == 2 else class_count


def build_model(config: UNetConfig | ImportedConfig, allow_import: bool = True, class_count: int = 2) -> nn.Module:
    """(B, 3, H, W) float → logits (B, C, H, W), C by `output_count`; of an imported network as its options say.

    An imported network that returns a dictionary gives its entry `out`, as torchvision's do. Raises UserError for a
    name that is no network, options that it does not take, and, without `allow_import`, for any imported network: the
    import runs code, and a config from elsewhere may name any.
    """
    if isinstance(config, UNetConfig):
        outputs = output_count(class_count)
        return UNet(width=config.width, depth=config.depth, norm=config.norm, out_channels=outputs)
    if not allow_import:
        raise UserError(
            f"model.name {config.name!r}: runs code that this config names; if you trust it, allow the import with "
            "--allow-import"
        )
    with _working_folder_last():
        factory = _factory(config.name)
        try:
            model = factory(**config.options)
        except Exception as error:
            raise UserError(f"model.options {config.options}: {config.name}: {_one_line(error)}") from None
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name {config.name!r}: returned a {type(model).__name__}, not an nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError(f"model.name {config.name!r}: is compiled by torch.jit; name the nn.Module that it was made of")
    model.register_forward_hook(_entry_out)
    return model


def _factory(name: str) -> Callable[..., nn.Module]:
    """What `name` names, if it is a class of networks or declared to return one; it is not called here."""
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:
        mend = "name an importable package.module:callable"
        raise UserError(f"model.name {name!r}: {_one_line(error)}; {mend}") from None
    if not (_is_network(factory) or _is_network(_return_annotation(factory)) or _is_declared(factory)):
        raise UserError(
            f"model.name {name!r}: is neither an nn.Module class nor declared to return one; annotate the function, "
            f"`def {attribute}(…) -> nn.Module`"
        )
    return factory


def _is_network(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, nn.Module)


def _is_declared(thing: Any) -> bool:
    return callable(thing) and getattr(thing, DECLARATION, False) is True


def _return_annotation(thing: Any) -> Any:
    try:
        return typing.get_type_hints(thing).get("return")
    except Exception:  # no function, or an annotation that names what is not there
        return None


@contextmanager
def _working_folder_last() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.reverse()
        sys.path.remove(folder)  # the last one, whatever the import has done to the path
        sys.path.reverse()


def _entry_out(_module: nn.Module, _inputs: Any, output: Any) -> Tensor | None:
    return output["out"] if isinstance(output, Mapping) and "out" in output else None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ImportError | AttributeError | TypeError) else f"{type(error).__name__}: {text}"
