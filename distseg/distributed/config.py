"""The `deepspeed` section of a config."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from distseg.section import Section


class DeepSpeedConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 0
    """3: parameters lie in shards, and the meta pass gathers each for as long as an operator needs it."""
    gradient_clipping: Annotated[float, Field(ge=0)] = 0.0
    """Largest norm of the gradient; 0 clips nothing."""
    config_file: Path | None = None
    """JSON with further DeepSpeed keys, for instance bucket sizes (configs/deepspeed/)."""
