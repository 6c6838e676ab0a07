"""No noise."""

from typing import Literal

import numpy as np

from distseg.data.noise.kind import Image, Mask, NoiseKind


class NoNoise(NoiseKind):
    """Takes the manifest's noisy_mask where there is one, and the true mask elsewhere."""

    kind: Literal["none"] = "none"

    def draw(self, mask: Mask, image: Image | None, rng: np.random.Generator) -> Mask:
        return mask
