"""One trial forward before a run: a network that cannot be trained is told in one line, with the shape and the mend."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from distseg.errors import UserError

_PROBABILITIES = (nn.Sigmoid, nn.Softmax, nn.Softmax2d)
_PROBABILITY_NODES = ("SigmoidBackward", "SoftmaxBackward")


def check_network(model: nn.Module, name: str, image_size: int, images: int, class_count: int = 2) -> None:
    """Run a copy of `model`, on its device, in training and in evaluation mode. Nothing is left changed.

    `images` is the number that a layer of statistics sees at once: the smallest batch size times the ranks. Raises
    UserError unless (B, 3, H, W) gives float logits (B, C, H, W), C = 1 or 2 for two classes, and their number for
    more.
    """
    parameter = next(iter(model.parameters()), None)
    if parameter is None:
        raise UserError(f"model.name {name}: has no parameters to train; choose another network")
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        trial = copy.deepcopy(model)
        for training in (True, False):
            batch = torch.randn(min(images, 2), 3, image_size, image_size).to(parameter)
            output, last = _forward(trial.train(training), batch, name)
            _check_output(output, batch, name)
            _check_logits(output, last, name)
            _check_channels(output.shape[1], class_count, name)


def _forward(model: nn.Module, batch: Tensor, name: str) -> tuple[Any, nn.Module | None]:
    """The output, and the innermost module that ran last."""
    ran: list[nn.Module] = []
    leaves = [module for module in model.modules() if not any(module.children())]
    hooks = [leaf.register_forward_hook(lambda module, _inputs, _output: ran.append(module)) for leaf in leaves]
    try:
        output = model(batch)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        mend = "see that the network takes images of this size, data.image_size"
        if "more than 1 value per channel" in text:
            mend = "set train.batch_size and train.clean_batch_size to 2 or more, or a network without BatchNorm there"
        raise UserError(
            f"model.name {name}: fails on images {tuple(batch.shape)}: {type(error).__name__}: {text}; {mend}"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
    return output, ran[-1] if ran else None


def _check_output(output: Any, batch: Tensor, name: str) -> None:
    """Raises UserError unless `output` is a float map of logits at the resolution of `batch`."""
    given, wanted = tuple(batch.shape), f"({len(batch)}, C, {batch.shape[2]}, {batch.shape[3]})"
    if not isinstance(output, Tensor):
        what = type(output).__name__
        if isinstance(output, tuple | list):
            what += " of " + ", ".join(_described(item) for item in output[:4])
        elif isinstance(output, dict):
            what += f" of {', '.join(map(str, list(output)[:4]))}"
        mend = f"return the logits {wanted} alone, in a module around it"
    elif output.ndim == 3:
        what, mend = _described(output), "add the dimension of the classes, logits.unsqueeze(1)"
    elif output.ndim != 4 or len(output) != len(batch) or not output.shape[1]:
        what, mend = _described(output), f"return logits {wanted}"
    elif output.shape[2:] != batch.shape[2:]:
        what, mend = _described(output), "bring the logits to the size of the images, F.interpolate(logits, size=…)"
    elif not output.is_floating_point():
        what, mend = str(output.dtype).removeprefix("torch."), "return the logits, before any argmax or rounding"
    else:
        return
    raise UserError(f"model.name {name}: gives {what} for images {given}, not logits {wanted}; {mend}")


def _check_logits(logits: Tensor, last: nn.Module | None, name: str) -> None:
    """Raises UserError for probabilities: the losses would take the sigmoid or softmax again."""
    made_by = type(last).__name__ if isinstance(last, _PROBABILITIES) else ""
    node = logits.grad_fn.name() if logits.grad_fn is not None else ""
    if not made_by and node.startswith(_PROBABILITY_NODES):
        made_by = node.partition("Backward")[0]
    if made_by and bool(((logits >= 0) & (logits <= 1)).all()):
        raise UserError(
            f"model.name {name}: gives probabilities, its last operation is {made_by}; remove it, losses take logits"
        )


def _check_channels(channels: int, class_count: int, name: str) -> None:
    fitting = (1, 2) if class_count == 2 else (class_count,)
    if channels not in fitting:
        wanted = " or ".join(map(str, fitting))
        raise UserError(
            f"model.name {name}: gives logits of {channels} channels, and {class_count} classes need {wanted}; set the "
            "number by its own argument, model.options.NAME, or name as many classes in data.classes"
        )


def _described(item: Any) -> str:
    return str(tuple(item.shape)) if isinstance(item, Tensor) else type(item).__name__
