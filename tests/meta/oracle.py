"""Two independent ways to the alignment map U, neither of which imports distseg: what its estimators are held to.

U_p = α ⟨g, ∇_θ ℓ_p(θ)⟩ with g = ∇_θ L_c(θ), Mirikharaji et al. 2019 (arXiv 1906.03815), section 2.
Shapes: B images, C logit channels, H×W pixels; class id 255 = ignore.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn

IGNORE = 255
Batch = tuple[Tensor, Tensor]
"""images (B, 3, H, W), masks (B, H, W)."""


def loss_map(logits_BCHW: Tensor, masks_BHW: Tensor) -> Tensor:
    """log Σ_c exp z_c − z_y, where one channel stands for the two logits (0, z); 0 at ignored pixels."""
    valid = masks_BHW != IGNORE
    if logits_BCHW.shape[1] == 1:
        logits_BCHW = torch.cat([torch.zeros_like(logits_BCHW), logits_BCHW], dim=1)
    logits_BCHW = torch.where(valid[:, None], logits_BCHW, torch.zeros_like(logits_BCHW))
    labels = torch.where(valid, masks_BHW.long(), torch.zeros_like(masks_BHW.long()))
    loss = torch.logsumexp(logits_BCHW, dim=1) - logits_BCHW.gather(1, labels[:, None])[:, 0]
    return torch.where(valid, loss, torch.zeros_like(loss))


def double_backward(
    model: nn.Module, noisy: Batch, clean: Batch, alpha: float = 1.0, seed: int = 0, initial_weight: float = 0.0
) -> Tensor:
    """U (B, H, W) by the paper's five steps: W = 0, virtual SGD step, clean loss of the fast weights, −∂L_c/∂W.

    The weights may start at the same value on every valid pixel, of the sum `initial_weight`. Works on a copy of the
    model, whose parameters are replaced one by one. The RNG is seeded before each of the passes.
    """
    (images, masks), (clean_images, clean_masks) = noisy, clean
    net = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        valid = (masks != IGNORE).to(images.dtype)
        weights = (valid * initial_weight / valid.sum()).requires_grad_()
        trainable = [p for p in net.parameters() if p.requires_grad]
        torch.manual_seed(seed)
        inner = (weights * loss_map(net(images), masks)).sum()
        gradients = torch.autograd.grad(inner, trainable, create_graph=True, allow_unused=True)
        fast = {
            id(p): p if gradient is None else p - alpha * gradient
            for p, gradient in zip(trainable, gradients, strict=True)
        }
        for module in net.modules():
            for name, p in list(module._parameters.items()):
                if id(p) in fast:
                    del module._parameters[name]
                    setattr(module, name, fast[id(p)])
        torch.manual_seed(seed)
        clean_loss = loss_map(net(clean_images), clean_masks).sum() / (clean_masks != IGNORE).sum()
        [gradient] = torch.autograd.grad(clean_loss, [weights])
    return -gradient


def normalised(alignment: Tensor) -> Tensor:
    """Step 4 of the paper: max(U, 0) over its sum."""
    positive = alignment.clamp(min=0)
    return positive / positive.sum()


def pixelwise_alignment(model: nn.Conv2d, noisy: Batch, clean: Batch) -> tuple[np.ndarray, float]:
    """U (B, H, W) at α = 1 and ‖g‖ of a 1×1 convolution z_c = w_c·x + b_c by hand, float64.

    With the error e_pc = ∂ℓ_p/∂z_pc (σ(z) − y for one channel, softmax(z)_c − [c = y] for several) and x̃ = (x, 1):

        ∇ℓ_p = e_p x̃_pᵀ,   g = (1/N) Σ_q e_q x̃_qᵀ over the N valid clean pixels,   U_p = ⟨g, ∇ℓ_p⟩ = e_pᵀ g x̃_p.
    """
    weight = model.weight.detach().double().numpy()[:, :, 0, 0]
    bias = model.bias.detach().double().numpy()

    def errors_and_inputs(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        images, masks = (tensor.numpy() for tensor in batch)
        valid = masks.reshape(-1) != IGNORE
        x = np.moveaxis(images.astype(np.float64), 1, -1).reshape(len(valid), -1)
        y = np.where(valid, masks.reshape(-1), 0).astype(int)
        z = x @ weight.T + bias
        if len(bias) == 1:
            error = 1 / (1 + np.exp(-z)) - y[:, None]
        else:
            error = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) - np.eye(len(bias))[y]
        return np.where(valid[:, None], error, 0), np.hstack([x, np.ones((len(x), 1))]), valid

    error, x, valid = errors_and_inputs(clean)
    gradient = error.T @ x / valid.sum()
    error, x, _ = errors_and_inputs(noisy)
    alignment = np.einsum("pc,cd,pd->p", error, gradient, x)
    return alignment.reshape(noisy[1].shape), float(np.linalg.norm(gradient))
