"""The methods that have a name: each spelled out as phases, weighting, loss and labels.

What a preset leaves out is each part's default: noisy images throughout, uniform weights, cross-entropy, labels as
drawn. Any key may be set beside the name, so that `finetune` with another loss, or weights on corrected labels, is a
line in a config.
"""

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # The noisy masks are trusted.
    "noisy_only": {},
    # The noisy images are left alone.
    "clean_only": {"phases": {"kind": "clean"}},
    # Half noisy, half clean images in each batch.
    "union": {"phases": {"kind": "union"}},
    # The noisy images first, then the clean ones.
    "finetune": {"phases": {"kind": "noisy", "clean_phase": 0.3}},
    # Ren et al. 2018: one weight an image.
    "image_reweight": {"weighting": {"kind": "aligned", "granularity": "image"}},
    # Mirikharaji, Yan, Hamarneh 2019: one weight a pixel.
    "pixel_reweight": {"weighting": {"kind": "aligned"}},
    # Dawid and Skene 1979 by distance to the drawn contour, calibrated on clean images that are learned from later.
    "label_correction": {
        "phases": {"kind": "noisy", "warm_up": 0.3, "include_clean": True, "held_out": 0.3},
        "labels": {"kind": "corrected"},
    },
    # Shu et al. 2019: weights as a learned function of the loss.
    "meta_weight_net": {"weighting": {"kind": "learned"}},
    # Milletari et al. 2016, Isensee et al. 2021: a loss that small lesions weigh in.
    "dice_cross_entropy": {"loss": {"kind": "dice_cross_entropy"}},
    # Zhang and Sabuncu 2018: a bounded loss.
    "generalised_cross_entropy": {"loss": {"kind": "generalised_cross_entropy"}},
    # Gonzalez-Jimenez et al. 2023: a loss of heavy tails.
    "t_loss": {"loss": {"kind": "t_loss"}},
    # Every training image with its true mask: what there is to be had.
    "oracle": {"phases": {"kind": "truth"}},
}
