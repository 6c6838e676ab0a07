"""Which images a step takes, and when: the training in phases.

noisy   noisy images first as they are (warm_up), then under the method's weights and labels, beside the clean ones
        if wished (include_clean, after held_out), and the clean images alone last (clean_phase)
clean   the clean images alone
union   half noisy, half clean images in each batch
truth   every training image with its true mask, the noisy stream's too
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from distseg.data.batch import Batch
from distseg.data.streams import Stream
from distseg.methods.context import Context
from distseg.section import Fraction, Section, of_kind


@dataclass(frozen=True)
class Phase:
    """Where the images of a step come from."""

    noisy: Stream | None = None
    clean: Stream | None = None
    held_out: Stream | None = None
    """Clean images for a label model, none of which has been learned from; `masks` are as drawn where they are too."""
    clean_share: float | None = None
    """Of the loss; None where every valid pixel of both streams counts the same."""
    main: bool = False
    """Whether the method's weights and labels are at work: else weights are uniform and labels as drawn."""

    def batches(self, index: int, accumulation: int) -> list[list[Batch]]:
        """This rank's micro-batches of step `index`: noisy, clean and held-out ones, each may be none."""
        return [
            [stream.batch(index, micro) for micro in range(accumulation)] if stream else []
            for stream in (self.noisy, self.clean, self.held_out)
        ]


@dataclass(frozen=True)
class Phases:
    """A schedule: the first step of each phase, ascending, and the phase."""

    schedule: tuple[tuple[int, Phase], ...]

    def at(self, index: int) -> Phase:
        return [phase for first, phase in self.schedule if first <= index][-1]


class NoisyConfig(Section):
    kind: Literal["noisy"] = "noisy"
    warm_up: Fraction = 0.0
    """The first part of the steps, spent on the noisy images as they are: uniform weights, labels as drawn."""
    clean_phase: Fraction = 0.0
    """The last part of the steps, spent on the clean images alone."""
    include_clean: bool = False
    """Between the two, also learn from a clean batch."""
    held_out: Fraction = 0.0
    """include_clean: the part of the steps after warm_up in which the clean images are not learned from yet. Labels of
    kind corrected are calibrated on them as long."""
    clean_share: Fraction | None = None
    """include_clean: how much of the loss is the mean clean one, 0.5 unless set; the rest is the noisy one."""

    takes_noisy: ClassVar[bool] = True

    @property
    def holds_out_clean(self) -> bool:
        """Whether there is a part after warm_up in which the clean images are not learned from."""
        return not self.include_clean or self.held_out > 0

    @model_validator(mode="before")
    @classmethod
    def _half_of_the_loss(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("include_clean") and values.get("clean_share") is None:
            return values | {"clean_share": 0.5}
        return values

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if self.warm_up + self.held_out + self.clean_phase > 1:
            parts = f"warm_up {self.warm_up}, held_out {self.held_out} and clean_phase {self.clean_phase}"
            raise ValueError(f"{parts} are more than all steps")
        if self.held_out and not self.include_clean:
            raise ValueError("held_out applies where .include_clean=true; set that, or .held_out=0")
        if self.clean_share is not None and not self.include_clean:
            raise ValueError("clean_share applies where .include_clean=true; set that, or .clean_share=null")
        return self

    @property
    def takes_clean(self) -> bool:
        return self.include_clean or self.clean_phase > 0

    def build(self, context: Context, needs_clean: bool, needs_held_out: bool) -> Phases:
        noisy = context.noisy_stream()
        main = Phase(
            noisy,
            clean=context.clean_stream(context.clean_batch_size) if needs_clean else None,
            held_out=context.held_out_stream(context.clean_batch_size) if needs_held_out else None,
            clean_share=0.0,
            main=True,
        )
        first = round(context.steps * self.warm_up)
        schedule = [(0, Phase(noisy)), (first, main)]
        if self.include_clean:
            beside = Phase(noisy, context.clean_stream(context.clean_batch_size), None, self.clean_share, main=True)
            schedule.append((first + round(context.steps * self.held_out), beside))
        if self.clean_phase:
            clean = Phase(clean=context.clean_stream(context.batch_size))
            schedule.append((round(context.steps * (1 - self.clean_phase)), clean))
        return Phases(tuple(schedule))


class CleanConfig(Section):
    kind: Literal["clean"] = "clean"

    takes_noisy: ClassVar[bool] = False
    takes_clean: ClassVar[bool] = True
    holds_out_clean: ClassVar[bool] = False

    def build(self, context: Context, needs_clean: bool, needs_held_out: bool) -> Phases:
        return Phases(((0, Phase(clean=context.clean_stream(context.batch_size))),))


class UnionConfig(Section):
    kind: Literal["union"] = "union"

    takes_noisy: ClassVar[bool] = True
    takes_clean: ClassVar[bool] = True
    holds_out_clean: ClassVar[bool] = False

    def build(self, context: Context, needs_clean: bool, needs_held_out: bool) -> Phases:
        half = context.batch_size // 2
        return Phases(((0, Phase(context.noisy_stream(half), context.clean_stream(half), main=True)),))


class TruthConfig(Section):
    kind: Literal["truth"] = "truth"

    takes_noisy: ClassVar[bool] = False
    takes_clean: ClassVar[bool] = False
    holds_out_clean: ClassVar[bool] = False

    def build(self, context: Context, needs_clean: bool, needs_held_out: bool) -> Phases:
        return Phases(((0, Phase(clean=context.true_stream())),))


Schedules = NoisyConfig | CleanConfig | UnionConfig | TruthConfig
PhasesConfig = Annotated[Schedules, Field(discriminator="kind"), of_kind(Schedules)]
