"""The step of each method: which images it learns from, the weight of each of their pixels, and of which loss.

Every method is the same update, ∇ Σ W·ℓ over the global batch, and differs only in where its images come from, in W
and, for the robust losses, in ℓ. `draw(step)` yields this rank's micro-batches of a step with their weight maps.

    noisy_only                 noisy stream                          W uniform
    clean_only                 clean stream                          W uniform
    union                      half noisy, half clean in each batch  W uniform
    finetune                   noisy, then clean (clean_phase)       W uniform
    oracle                     every training image, true masks      W uniform
    image_reweight             noisy stream                          W from the clean gradient, per image (Ren 2018)
    pixel_reweight             noisy stream                          W from the clean gradient (Mirikharaji 2019)
    label_correction           noisy, both, then clean               W uniform, wrong labels corrected
    meta_weight_net            noisy stream                          W learned, from the pixel's loss (Shu 2019)
    generalised_cross_entropy  noisy stream                          W uniform, ℓ bounded (Zhang and Sabuncu 2018)
    t_loss                     noisy stream                          W uniform, ℓ of heavy tails (Gonzalez-Jimenez 2023)
"""

from collections.abc import Callable

from distseg.methods.generalised_cross_entropy import GeneralisedCrossEntropy
from distseg.methods.label_correction import LabelCorrection
from distseg.methods.meta_weight_net import MetaWeightNet
from distseg.methods.reweighted import image_reweight, pixel_reweight
from distseg.methods.step import Method, Parts, WeightedBatch
from distseg.methods.t_loss import TLoss
from distseg.methods.uniform import clean_only, finetune, noisy_only, oracle, union

METHODS: dict[str, Callable[[Parts], Method]] = {
    "noisy_only": noisy_only,
    "clean_only": clean_only,
    "union": union,
    "finetune": finetune,
    "image_reweight": image_reweight,
    "pixel_reweight": pixel_reweight,
    "label_correction": LabelCorrection,
    "meta_weight_net": MetaWeightNet,
    "generalised_cross_entropy": GeneralisedCrossEntropy,
    "t_loss": TLoss,
    "oracle": oracle,
}

__all__ = ["METHODS", "Method", "Parts", "WeightedBatch", "build_method"]


def build_method(parts: Parts) -> Method:
    """The method that the config names."""
    return METHODS[parts.config.method.name](parts)
