"""`head`: the part of the alignment map U that the last layer has, of networks that end in a 1×1 convolution.

Such a network is z = V·φ + b at each pixel, φ the features that its last layer is given. With δ = ∂ℓ/∂z, the part that
the last layer's parameters have in U_p = ⟨g, ∇_θ ℓ_p⟩ needs no derivative of the network:

    ∇_V ℓ_p = δ_p φ_pᵀ,   G = (1/N) Σ_q δ_q φ_qᵀ and g_b = (1/N) Σ_q δ_q over the N valid clean pixels,
    U_p = ⟨G, δ_p φ_pᵀ⟩ + ⟨g_b, δ_p⟩ = Σ_c δ_pc ż_pc,   ż = G·φ + g_b

One forward pass of the clean images and one of the noisy ones; no parameter is read, and none need be whole. It is what
`forward` gives where all that is trained is the last layer, and an approximation elsewhere.

Features φ (B, F, H, W), logits (B, C, H, W).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.errors import InvalidArgument
from distseg.meta.estimators import LabelledImages, MeanLoss, SummedLoss, summed_loss, valid_count
from distseg.meta.network import Network, Parameters
from distseg.meta.reduction import Reduction


class Head:
    """The last layer of a network, found when the network first runs.

    Raises InvalidArgument there for a network whose output is not that of a 1×1 convolution with a trained weight.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._name: str | None = None

    def mean_gradient(
        self,
        network: Network,
        parameters: Parameters,
        batches: Sequence[LabelledImages],
        reduction: Reduction,
        loss: SummedLoss = summed_loss,
    ) -> MeanLoss:
        """A loss averaged over the valid pixels of the global batch, and the layer's part of its gradient.

        Every process has the whole of that part, wherever the parameters are. Sums travel, with the count of valid
        pixels, in one reduction of CF + C + 1 numbers.
        """
        sums, values = [], []
        for images, masks in batches:
            logits, features = self._logits_and_features(network, parameters, images)
            own, value = _summed_gradient(logits, features, masks, loss)
            sums.append(own)
            values.append(value)
        total = torch.stack(sums).sum(0)
        count = valid_count(batches).to(total.dtype)
        weight, bias, count = reduction.sum(torch.cat([total, count.reshape(1)])).split(self._sizes())
        count = count.squeeze().clamp(min=1)
        layer = self._layer
        gradient = {"weight": (weight / count).view(layer.out_channels, layer.in_channels, 1, 1), "bias": bias / count}
        trained = {_parameter(self._name, name): value for name, value in gradient.items() if self._trains(name)}
        return MeanLoss(trained, torch.stack(values).sum() / count)

    def logits_along(
        self, network: Network, parameters: Parameters, gradient: Parameters, images: Tensor
    ) -> tuple[Tensor, Tensor]:
        """z and ż (B, C, H, W), constants to autograd; U = Σ_c ∂ℓ/∂z_c · ż_c. The gradient may have other parts too."""
        logits, features = self._logits_and_features(network, parameters, images)
        return logits, self._tangents(features, gradient).to(logits.dtype)

    def carry(self, network: nn.Module, gradient: Parameters, images: Tensor) -> tuple[Tensor, Tensor]:
        """z with its graph and ż, a constant, of a pass of a module that has this layer's parameters. Needs `find`."""
        passed, weight = _Passed(), self._layer.weight
        [layer] = [each for each in network.modules() if isinstance(each, nn.Conv2d) and each.weight is weight]
        handle = layer.register_forward_hook(partial(passed.of_layer, ""))
        try:
            logits = network(images)
        finally:
            handle.remove()
        return logits, self._tangents(passed.inputs[""].detach(), gradient).to(logits.dtype)

    def find(self, network: Network, parameters: Parameters, images: Tensor) -> None:
        """Find the layer, if no pass has yet."""
        if self._name is None:
            self._logits_and_features(network, parameters, images)

    def part(self, gradient: Parameters) -> Parameters:
        """What of a gradient is by the layer's parameters: weight (C, F, 1, 1), and bias (C,) where it is trained."""
        return {name: gradient[_parameter(self._name, name)] for name in ("weight", "bias") if self._trains(name)}

    def _tangents(self, features: Tensor, gradient: Parameters) -> Tensor:
        """ż = G·φ + g_b, (B, C, H, W), in the features' precision."""
        part = {name: value.to(features.dtype) for name, value in self.part(gradient).items()}
        return F.conv2d(features, part["weight"], part.get("bias"))

    def _logits_and_features(self, network: Network, parameters: Parameters, images: Tensor) -> tuple[Tensor, Tensor]:
        """z and φ of images, constants to autograd."""
        passed = _Passed()
        with torch.no_grad(), self._watched(passed):
            logits = network(parameters, images)
        last = [name for name, output in passed.outputs.items() if output is passed.result]
        if not last or _parameter(last[0], "weight") not in parameters:
            raise InvalidArgument(
                "estimator head: the network's output is not that of a trained 1×1 convolution (nn.Conv2d); use "
                "estimator=forward"
            )
        self._name = last[0]
        return logits, passed.inputs[self._name]

    @contextmanager
    def _watched(self, passed: "_Passed") -> Iterator[None]:
        """Within, the network fills `passed`: of every 1×1 convolution, or of the last layer once it is known."""
        layers = {
            name: layer
            for name, layer in self._module.named_modules()
            if isinstance(layer, nn.Conv2d) and _is_pixelwise(layer) and self._name in (None, name)
        }
        handles = [layer.register_forward_hook(partial(passed.of_layer, name)) for name, layer in layers.items()]
        handles.append(self._module.register_forward_hook(passed.of_network))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def _layer(self) -> nn.Conv2d:
        assert self._name is not None, "no pass has found the layer yet"
        layer = self._module.get_submodule(self._name)
        assert isinstance(layer, nn.Conv2d)
        return layer

    def _trains(self, name: str) -> bool:
        parameter = getattr(self._layer, name)
        return parameter is not None and parameter.requires_grad

    def _sizes(self) -> list[int]:
        """Of G and g_b, flattened, and of the count."""
        layer = self._layer
        return [layer.out_channels * layer.in_channels, layer.out_channels, 1]


class _Passed:
    """What layers were last given and gave, by name, and what the network gave."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.result: Any = None

    def of_layer(self, name: str, _layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.inputs[name], self.outputs[name] = inputs[0], output

    def of_network(self, _network: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        self.result = output


def _summed_gradient(logits: Tensor, features: Tensor, masks: Tensor, loss: SummedLoss) -> tuple[Tensor, Tensor]:
    """(CF + C,): Σ δ φᵀ and Σ δ over the batch; and the loss."""
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(leaf, masks)
        [delta] = torch.autograd.grad(value, leaf)
    by_pixel, by_feature = (part.movedim(1, 0).flatten(1) for part in (delta, features.to(delta.dtype)))
    return torch.cat([(by_pixel @ by_feature.T).flatten(), by_pixel.sum(1)]), value.detach()


def _parameter(layer: str | None, name: str) -> str:
    """The name of a layer's parameter in the network, whose last layer it may be all of."""
    return f"{layer}.{name}" if layer else name


def _is_pixelwise(layer: nn.Conv2d) -> bool:
    plain = layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding in ((0, 0), "valid", "same")
    return plain and layer.groups == 1
