"""One experiment, top to bottom: data, network, engine, then step after step."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from distseg.config.load import changed_keys, dump_config, load_config
from distseg.config.schema import Config
from distseg.data.annotators import Annotators
from distseg.data.batch import Labels
from distseg.data.sample import Sample
from distseg.data.streams import Stream, evaluation_batches
from distseg.distributed.batch_norm import synchronise_batch_norm
from distseg.distributed.collectives import AllReduce, main_rank_first, sum_over_ranks
from distseg.distributed.engine import build_engine, can_add_gradients, shadow_of, sharded_parameters
from distseg.distributed.network_state import refuse_unsaved_state
from distseg.distributed.ranks import ShardSpec
from distseg.distributed.runtime import Runtime
from distseg.errors import BadFileError, UserError
from distseg.evaluation.metrics import counts_csv, never_predicted, summarise
from distseg.files import write_atomically
from distseg.meta.check import check_estimator
from distseg.meta.placement import Whole
from distseg.methods.context import Context
from distseg.methods.method import Method, build_method
from distseg.methods.step import MicroBatch
from distseg.methods.weighting.aligned import AlignedConfig
from distseg.methods.weighting.learned import LearnedConfig
from distseg.models.check import check_network
from distseg.models.registry import build_model
from distseg.optim.optimizers import build_optimizer
from distseg.optim.schedules import learning_rate
from distseg.pages.figures import panel
from distseg.run_folder import RunFolder
from distseg.training.cadence import Cadence
from distseg.training.checkpoint import load_checkpoint, load_network, save_checkpoint
from distseg.training.guard import Guard
from distseg.training.recorder import RunRecorder
from distseg.training.scoring import Counts, score
from distseg.training.splits import Splits, prepare_splits
from distseg.training.train_step import Outcome, train_step
from distseg.training.warm_start import warm_start

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come: what a checkpoint holds beside tensors."""

    step: int = 0
    """Updates made; the next one has this index."""
    seconds: float = 0.0
    best_dice: float = -1.0
    """Of the validations so far, and the step after which it was reached."""
    best_step: int = 0
    zero_maps: float = 0.0
    """How often the policy for an all-zero weight map has acted."""
    skipped_steps: int = 0
    """Updates skipped because a loss or a gradient was not finite, and how many of the last ones in a row."""
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Clock:
    """How long a run has taken, as if it had never stopped."""

    first_step: int
    """Updates that earlier starts had made, and the seconds that they took."""
    earlier: float
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self.began

    def steps_per_second(self, done: int) -> float:
        """Of this start."""
        return (done - self.first_step) / (time.monotonic() - self.began)


class Preempted(Exception):
    """The run was asked to stop, and has: `--resume` continues it."""


class NotSaved(Exception):
    """The run is done, and its last checkpoint could not be written."""


class Trainer:
    """Owns a run: build it, then `run()` it or `rehearse()` it. Every rank does both."""

    config: Config
    folder: RunFolder
    runtime: Runtime
    splits: Splits
    steps: int
    """Updates from the first to the last."""
    cadence: Cadence
    model: nn.Module
    parameter_count: int
    optimizer_kind: str
    engine: Any
    """DeepSpeed's; its module is `model`."""
    annotators: Annotators | None
    """Of data.annotators=all, whose batches have every annotation; else None."""
    streams: list[Stream]
    method: Method
    progress: Progress
    guard: Guard
    saved_step: int
    """Of the last checkpoint that is on the disk."""
    zero_maps: Tensor
    """() float64 on the device: `progress.zero_maps` as it is now."""
    clock: Clock
    """It and the four above are there from the start of `run`."""

    def __init__(self, config: Config, folder: Path, runtime: Runtime) -> None:
        self.config, self.folder, self.runtime = config, RunFolder(folder), runtime
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, class_count=config.data.class_count).to(runtime.device)
        side = config.data.image_size
        smallest = min(config.train.batch_size, config.train.clean_batch_size) * runtime.shard.world_size
        check_network(self.model, config.model.name, side, smallest, config.data.class_count)
        trial = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        refuse_unsaved_state(self.model.train(), trial.to(runtime.device))
        weighting = config.method.weighting
        if isinstance(weighting, AlignedConfig | LearnedConfig):
            check_estimator(weighting.estimator, self.model, trial.to(runtime.device))
        if (source := config.model.init_from) is not None:
            main_rank_first(lambda: warm_start(self.model, source, self.folder, runtime.is_main), runtime.device)
        if runtime.shard.world_size > 1:
            self.model = synchronise_batch_norm(self.model)
        self.splits = main_rank_first(
            lambda: prepare_splits(config.data, config.seed, self.folder, runtime.is_main, config.method.needs_clean),
            runtime.device,
        )
        self.steps = config.train.steps or math.ceil(
            (config.train.epochs or 0) * len(self.splits.noisy) / self.images_per_step
        )
        self.cadence = Cadence(config.train, self.steps)

        shadow = shadow_of(self.model).train()
        self.parameter_count = sum(p.numel() for p in self.model.parameters())  # before ZeRO-3 takes them apart
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer, self.optimizer_kind = build_optimizer(parameters, config.optim)
        self.engine = build_engine(
            self.model,
            optimizer,
            config.deepspeed,
            batch_size=config.train.batch_size,
            accumulation=config.train.accumulation,
            precision=config.train.precision,
        )
        every = config.data.annotators == "all"
        self.annotators = Annotators.of(self.splits.noisy, self.splits.clean) if every else None
        if self.annotators:
            self.annotators.check_several()
        self.streams = []
        context = Context(
            noisy=self.splits.noisy,
            clean=self.splits.clean,
            steps=self.steps,
            batch_size=config.train.batch_size,
            clean_batch_size=config.train.clean_batch_size,
            accumulation=config.train.accumulation,
            seed=config.seed,
            open_stream=self._open_stream,
            model=shadow,
            placement=sharded_parameters(shadow) if self.sharded else Whole(shadow),
            reduction=AllReduce(self.sharded),
            device=runtime.device,
            one_pass=not self.sharded and config.train.precision == "fp32",
            adds_gradients=can_add_gradients(self.engine),
            annotators=len(self.annotators.names) if self.annotators else None,
            classes=config.data.class_count,
        )
        self.method = build_method(config.method, context)

    def run(self, resume: bool, stop_agreed: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Train to the last step and score the test split; returns what result.json holds.

        `stop_agreed`, asked once a step, says the same on every rank. Raises Preempted where it said yes, Diverged
        after `train.max_bad_steps` bad steps in a row, NotSaved where the last checkpoint could not be written.
        """
        with closing(self):
            self._begin(resume)
            recorder = RunRecorder(self.config, self.folder, self.steps, self.progress.step, self.runtime.is_main)
            return self._train(recorder, stop_agreed)

    def _train(self, recorder: RunRecorder, stop_agreed: Callable[[], bool]) -> dict[str, Any]:
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        try:
            for index in range(self.progress.step, self.steps):
                done = index + 1
                outcome = self._train_step(index)
                recorder.advance()
                if self.cadence.logs(done):
                    self._log(outcome, recorder)
                if self.cadence.draws(done):
                    recorder.figure(done, self.draw(outcome.step.micro_batches[0], f"{self.config.name}, step {done}"))
                best = self.cadence.validates(done) and self._validate(recorder)
                if best or self.cadence.saves(done):
                    self._save(best)
                if done < self.steps and stop_agreed():
                    self._stop()
            result = self._finish(recorder)
            status = "FINISHED"
        except Preempted:
            status = "KILLED"
            raise
        except BadFileError as error:
            kept = f"the checkpoint of step {self.saved_step}" if self.saved_step else "the start"
            raise BadFileError(f"{error}; --resume goes on from {kept}") from None
        finally:
            recorder.close(status)
        return result

    def rehearse(self) -> str:
        """One real step and nothing kept: what a run with this config would do."""
        outcome = train_step(self.engine, self.method, 0, self._learning_rate(0), diagnose=True)
        loss = sum_over_ranks(outcome.loss).item()
        self.close()
        config, splits, shard = self.config, self.splits, self.runtime.shard
        parts, side = config.method, config.data.image_size
        wrong = "not known" if math.isnan(splits.noise_rate) else f"{splits.noise_rate:.1%}"
        ranks = f"{shard.world_size} ranks ({self.runtime.device.type})"
        counts = f"{len(splits.noisy)} noisy, {len(splits.clean)} clean, {len(splits.val)} val, {len(splits.test)} test"
        lines = [
            f"data       {counts}; wrong pixels in the noisy masks: {wrong}",
            f"network    {config.model.name}, {self.parameter_count:,} parameters, input {side}², {config.data.shape}",
            f"method     {parts.name}: phases {parts.phases.kind}, weights {parts.weighting.kind}, loss "
            f"{parts.loss.kind}, labels {parts.labels.kind}",
            f"optimiser  {config.optim.name} ({self.optimizer_kind}), ZeRO stage {config.deepspeed.zero_stage}",
            f"budget     {self.steps} steps of {self.images_per_step} images on {ranks}",
            f"loss       {loss:.4f} on the first batch",
            *(f"meta       {name} {value.item():.4g}" for name, value in outcome.diagnostics.items()),
        ]
        return "\n".join(lines)

    def score(self, samples: Sequence[Sample], own: bool) -> Counts:
        """The counts of each sample, at the files' own resolution too where `own` says so. Every rank calls it."""
        batch_size = 2 * self.config.train.batch_size
        return score(self.model, samples, self.config.data, self.runtime, batch_size, self.sharded, own)

    @torch.no_grad()
    def draw(self, micro: MicroBatch, caption: str) -> np.ndarray:
        """(h, w, 3) uint8: what the network was shown, told to weigh, and now predicts. Every rank calls it."""
        batch = micro.batch
        self.model.eval()
        logits = self.model(batch.images).float()
        self.model.train()
        names = self.config.data.class_names
        if len(names) > 2:
            probabilities = logits.softmax(1)
        else:
            probabilities = logits[:, 0].sigmoid() if logits.shape[1] == 1 else 1 - logits.softmax(1)[:, 0]
        assert micro.weights is not None, "the step has been made"
        weights = micro.weights.full(batch.masks)
        return panel(batch.pictures, batch.masks, batch.true_masks, weights, probabilities, caption, names)

    def close(self) -> None:
        for stream in self.streams:
            stream.close()

    @property
    def sharded(self) -> bool:
        return self.config.deepspeed.zero_stage == 3

    @property
    def images_per_step(self) -> int:
        return self.config.train.batch_size * self.config.train.accumulation * self.runtime.shard.world_size

    def _begin(self, resume: bool) -> None:
        """Make the folder ready and take up the last checkpoint, if there is one and it is wished."""
        restored = None
        if resume:
            restored = load_checkpoint(self.folder.checkpoints, self.engine, self.method, self.config, self.runtime)
        if restored and self.runtime.is_main:
            warn_if_bits_may_differ(self.config, self.runtime.device)
        if self.runtime.is_main:
            self.folder.figures.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder.config, dump_config(self.config))
        self.progress = Progress(**restored) if restored else Progress()
        self.saved_step = self.progress.step
        self.clock = Clock(self.progress.step, self.progress.seconds)
        self.guard = Guard(
            self.config.train.max_bad_steps,
            self.runtime,
            self.progress.skipped_steps,
            self.progress.skipped_in_a_row,
        )
        self.zero_maps = torch.tensor(self.progress.zero_maps, device=self.runtime.device, dtype=torch.float64)

    def _train_step(self, index: int) -> Outcome:
        diagnose = self.cadence.logs(index + 1)
        outcome = train_step(self.engine, self.method, index, self._learning_rate(index), diagnose)
        self.guard.record(index + 1, outcome.bad, outcome.step.ids)
        self.zero_maps += outcome.diagnostics.get("zero_maps", 0)
        self.progress.step = index + 1
        return outcome

    def _learning_rate(self, index: int) -> float:
        return learning_rate(self.config.optim, index, self.steps)

    def _log(self, outcome: Outcome, recorder: RunRecorder) -> None:
        done = self.progress.step
        loss = sum_over_ranks(outcome.loss.clone()).item()
        self.guard.check()
        speed = self.clock.steps_per_second(done) * self.images_per_step
        metrics = {"train/loss": loss, "train/lr": self._learning_rate(done - 1), "train/images_per_second": speed}
        metrics["train/skipped_steps"] = self.guard.skipped
        metrics["train/seconds_waiting_for_data"] = sum(stream.waited for stream in self.streams)
        found = {name: value.item() for name, value in outcome.diagnostics.items()}
        metrics |= {name if "/" in name else f"meta/{name}": value for name, value in found.items()}
        if "zero_maps" in outcome.diagnostics:
            metrics["meta/zero_maps"] = self.zero_maps.item()
        recorder.metrics(done, metrics)
        recorder.show(f"loss {loss:.4f}, best val Dice {max(self.progress.best_dice, 0):.3f}, {speed:.1f} images/s")

    def _validate(self, recorder: RunRecorder) -> bool:
        """Score the validation split; whether it is the best so far."""
        counts, own = self.score(self.splits.val, own=self.config.data.score_own == "always")
        names = self.config.data.class_names
        if self.progress.step == self.steps and self.runtime.is_main:
            warn_if_nothing_is_marked(counts, self.config)
        own_scores = {} if own is None else summarise(own, "val/own", class_names=names)
        scores = summarise(counts, "val", class_names=names) | own_scores
        recorder.metrics(self.progress.step, scores)
        best = scores["val/dice"] > self.progress.best_dice
        if best:
            self.progress.best_dice, self.progress.best_step = scores["val/dice"], self.progress.step
        return best

    def _save(self, best: bool) -> None:
        self.guard.check()
        self.progress.zero_maps = self.zero_maps.item()
        self.progress.skipped_steps, self.progress.skipped_in_a_row = self.guard.skipped, self.guard.in_a_row
        self.progress.seconds = self.clock.seconds
        kept = asdict(self.progress)
        folder = self.folder.checkpoints
        if save_checkpoint(folder, self.engine, self.method, kept, self.config, self.runtime, best):
            self.saved_step = self.progress.step

    def _stop(self) -> None:
        done = self.progress.step
        if self.saved_step < done:
            self._save(best=False)
        if self.saved_step < done:
            raise NotSaved(
                f"{self.folder.checkpoints}: cannot be written to, what is kept is of step {self.saved_step}; make "
                "room, then --resume"
            )
        raise Preempted(f"stopped after step {done} of {self.steps}, as asked; --resume continues")

    def _finish(self, recorder: RunRecorder) -> dict[str, Any]:
        """Score the test split, once, and write what the run ends with."""
        if self.saved_step < self.steps:
            raise NotSaved(f"{self.folder.checkpoints}: cannot be written to; make room, then --resume")
        seconds = self.clock.seconds
        counts, own = self.score(self.splits.test, own=self.config.data.score_own != "never")
        names = self.config.data.class_names
        ids = [sample.id for sample in self.splits.test]
        if self.runtime.is_main:
            write_atomically(self.folder.test_counts, counts_csv(ids, counts, names))
            if own is not None:
                write_atomically(self.folder.test_counts_own, counts_csv(ids, own, names))
        own_scores = {} if own is None else summarise(own, "test/own", class_names=names)
        result = (
            summarise(counts, "test", class_names=names)
            | own_scores
            | {
                "name": self.config.name,
                "classes": list(names),
                "method": self.config.method.name,
                "steps": self.steps,
                "images_per_second": self.steps * self.images_per_step / seconds,
                "seconds": seconds,
                **self.splits.figures,
                "best_val_dice": self.progress.best_dice,
                "best_step": self.progress.best_step,
                "world_size": self.runtime.shard.world_size,
            }
        )
        recorder.result(result, self.steps)
        if self.config.tracking.log_model:
            recorder.model(self._portable_network)
        return result

    def _open_stream(self, name: str, samples: Sequence[Sample], labels: Labels, batch_size: int) -> Stream:
        config = self.config
        stream = Stream(
            samples,
            labels=labels,
            name=name,
            config=config.data,
            seed=config.seed,
            shard=self.runtime.shard,
            batch_size=batch_size,
            accumulation=config.train.accumulation,
            device=self.runtime.device,
            annotators=self.annotators,
        )
        self.streams.append(stream)
        return stream

    def _portable_network(self) -> tuple[nn.Module, np.ndarray]:
        """A copy of the network without the engine's hooks, and two validation images (2, 3, H, W) as its input."""
        _, network = load_network(self.folder.path, allow_import=True)
        samples, cpu = (2 * self.splits.val)[:2], torch.device("cpu")
        [batch] = evaluation_batches(samples, self.config.data, ShardSpec(), 2, cpu, windows=True)
        return network.eval(), batch.images.numpy()


def warn_if_nothing_is_marked(counts: np.ndarray, config: Config) -> None:
    """Say so, with what may mend it, where no validation image has a true or a false positive of a class."""
    names = config.data.class_names
    unmarked = never_predicted(counts, names)
    if not unmarked:
        return
    mend = "method.loss=dice_cross_entropy"
    if config.method.loss.kind == "dice_cross_entropy":
        mend = f"a lesion that counts for more, as in method.loss.class_weights=[1{',20' * (len(names) - 1)}]"
    logger.warning(
        "%s: the network marks no pixel %son any validation image; train longer, at another optim.lr, or, where "
        "lesions are small or masks miss many of them, with %s",
        config.name,
        f"as {' or '.join(unmarked)} " if len(names) > 2 else "",
        mend,
    )


def warn_if_bits_may_differ(config: Config, device: torch.device) -> None:
    """Say so where a resumed run need not give the bits of one that never stopped."""
    if device.type == "cuda" and not config.train.deterministic:
        logger.warning(
            "%s: resumed with train.deterministic=false; what follows may differ from what a run that never stopped "
            "gives, in its last bits at first",
            config.name,
        )


def has_finished(config: Config, folder: Path, resume: Literal["auto", "always"] | None) -> bool:
    """Whether this run has its result; reads only. One rank decides for all.

    Raises UserError for a folder that holds a run without `resume`, another run's config with it, and where `always`
    finds nothing to resume.
    """
    run = RunFolder(folder)
    if not run.config.exists():
        if resume == "always":
            raise UserError(f"{folder}: no run to resume; leave out --resume, or write --resume auto to start one")
        return False
    if not resume:
        raise UserError(f"{folder}: holds a run already; continue it with --resume, or choose another name=")
    try:
        before = load_config(run.config)
    except UserError as error:
        raise UserError(f"{folder}: was begun by another version of distseg ({error}); choose another name=") from None
    if changed := changed_keys(before, config):
        raise UserError(f"{folder}: --resume with another config: {changed[0]}; choose another name= for a new run")
    return run.result.exists()
