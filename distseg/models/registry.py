"""A network by the name that the config gives it."""

import importlib

from torch import nn

from distseg.errors import UserError
from distseg.models.config import ModelConfig
from distseg.models.unet import UNet


def build_model(config: ModelConfig) -> nn.Module:
    """`unet`, or what `package.module:callable` returns for `config.options`: (B, 3, H, W) → logits (B, C, H, W)."""
    if config.name == "unet":
        return UNet(width=config.width, depth=config.depth, norm=config.norm)
    module_name, _, attribute = config.name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"model.name {config.name!r}: {error}; name an importable package.module:callable") from None
    try:
        model = factory(**config.options)
    except TypeError as error:
        raise UserError(f"model.options {config.options}: {error}") from None
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name {config.name!r}: returned a {type(model).__name__}, not an nn.Module")
    return model
