"""The `train` section of a config."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from distseg.section import Count, Section


class TrainConfig(Section):
    steps: Count | None = None
    """Updates from the first to the last; set this or epochs."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the noisy stream; every method gets the same number of steps."""
    batch_size: Count = 6
    """Images of a micro-batch on each rank; so many clean ones where they come alone."""
    clean_batch_size: Count = 6
    """Clean images beside the noisy ones of a micro-batch on each rank. A run may be resumed with other sizes if their
    products with accumulation and the number of ranks, the images of a step, stay what they were."""
    accumulation: Count = 1
    """Micro-batches a step, whose gradients add up to those of one large batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is torch autocast in the weighted step; method.meta_precision is that of the meta pass."""
    deterministic: bool = True
    """On a GPU: the same bits from the same inputs, also after --resume, by slower operators where there is a choice. A
    warning names an operator that has no deterministic form, and a run that is resumed without this key."""
    tf32: bool = False
    """On a GPU: multiply in TensorFloat-32, with 10 bits of mantissa in place of 23, in the meta pass as well."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    validate_every: Count | None = None
    """Steps between validations; default: ten times a run."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints; default: at each validation."""
    keep_checkpoints: Count = 2
    """The newest ones that stay, beside the one of the best validation."""
    max_bad_steps: Count = 5
    """A run stops after so many steps in a row whose loss or gradient is not finite; each of them is skipped."""
    figure_every: Count | None = None
    """Steps between weight-map figures; default: at each validation."""

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of steps and epochs")
        return self
