"""The labels of the noisy images as they were drawn."""

from typing import ClassVar, Literal

from distseg.methods.context import Context
from distseg.section import Section


class DrawnConfig(Section):
    kind: Literal["drawn"] = "drawn"

    needs_held_out: ClassVar[bool] = False

    def build(self, context: Context) -> None:
        """No label model: the masks are the labels."""
        return
