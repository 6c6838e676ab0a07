"""No noise."""

from typing import Literal

from distseg.data.noise.kind import Image, Mask, NoiseKind


class NoNoise(NoiseKind):
    """The annotations that the data brings, and the reference where there is none."""

    kind: Literal["none"] = "none"

    def draw_for(self, sample_id: str, mask: Mask, image: Image | None, label: int = 1) -> Mask:
        return mask
