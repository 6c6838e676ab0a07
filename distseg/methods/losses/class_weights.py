"""Weights of classes: what the loss of a pixel is multiplied by for its label, whatever the pixel's own weight is.

They are part of ℓ, and so of the alignment map that weights by the clean gradient are made from. They are not divided
by their mean: weights of 2 for every class are twice the learning rate.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from distseg.methods.context import Context

ClassWeights = tuple[Annotated[float, Field(gt=0)], ...] | None


def class_weights_on(values: ClassWeights, context: Context) -> Tensor | None:
    """(classes,) float32 on the method's device; None where every class counts the same."""
    return None if values is None else torch.tensor(values, dtype=torch.float32, device=context.device)
