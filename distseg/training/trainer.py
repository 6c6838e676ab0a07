"""One experiment, top to bottom: data, network, engine, then step after step."""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from distseg.config.load import changed_keys, dump_config, load_config
from distseg.config.schema import Config
from distseg.data.checks import usable_samples
from distseg.data.noise.write import write_noisy_masks
from distseg.data.sample import Sample
from distseg.data.splits import split_clean
from distseg.data.streams import Stream, evaluation_batches
from distseg.distributed.batch_norm import synchronise_batch_norm
from distseg.distributed.collectives import begin_sum_over_ranks, broadcast_buffers, main_rank_first, sum_over_ranks
from distseg.distributed.engine import (
    build_engine,
    gradients_put_away,
    reduced_gradients,
    shadow_of,
    sharded_parameters,
    skip_update_if,
    skipped_by_engine,
)
from distseg.distributed.ranks import ShardSpec
from distseg.distributed.runtime import Runtime
from distseg.errors import BadFileError, UserError
from distseg.evaluation.evaluator import evaluate
from distseg.evaluation.metrics import counts_csv, summarise
from distseg.evaluation.report import panel, save_png
from distseg.files import write_atomically
from distseg.meta import PixelReweighter
from distseg.methods.registry import build_method
from distseg.methods.step import Method, Parts, WeightedBatch
from distseg.models.registry import build_model
from distseg.optim.optimizers import build_optimizer
from distseg.optim.schedules import learning_rate
from distseg.tracking.jsonl import JsonlLog
from distseg.tracking.mlflow import MlflowTracker
from distseg.training.checkpoint import load_checkpoint, load_network, save_checkpoint
from distseg.training.guard import Guard, not_finite

TEST_COUNTS = "test_counts.csv"
"""What result.json sums up: true and false positives and negatives of each test image."""


@dataclass(frozen=True)
class Splits:
    clean: list[Sample]
    noisy: list[Sample]
    val: list[Sample]
    test: list[Sample]
    noise_rate: float
    """Mean share of wrong pixels in the noisy stream's masks, NaN where their truth is not known."""


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
    """Updates left out because a loss or a gradient was not finite, and how many of them were the last ones."""
    skipped_in_a_row: int = 0


class Preempted(Exception):
    """The run was asked to stop, and has: `--resume` continues it."""


class NotSaved(Exception):
    """The run is done, and its last checkpoint could not be written."""


class Trainer:
    """Owns a run: build it, then `run()` it or `rehearse()` it. Every rank does both."""

    config: Config
    folder: Path
    runtime: Runtime
    splits: Splits
    steps: int
    model: nn.Module
    engine: Any
    """DeepSpeed's; its module is `model`."""

    def __init__(self, config: Config, folder: Path, runtime: Runtime) -> None:
        self.config, self.folder, self.runtime = config, folder, runtime
        torch.manual_seed(config.seed)
        self.model = build_model(config.model).to(runtime.device)
        if runtime.shard.world_size > 1:
            self.model = synchronise_batch_norm(self.model)
        self.splits = main_rank_first(lambda: prepare_data(config, folder, runtime.is_main), runtime.device)
        self.steps = _number_of_steps(config, len(self.splits.noisy), runtime.shard.world_size)

        shadow = shadow_of(self.model).train()
        self.parameter_count = sum(p.numel() for p in self.model.parameters())  # before ZeRO-3 takes them apart
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer, self.optimizer_kind = build_optimizer(parameters, config.optim)
        self.engine = build_engine(self.model, optimizer, config)
        placement = sharded_parameters(shadow) if config.deepspeed.zero_stage == 3 else None

        def reweighter(granularity: str, transform: str = "clamp") -> PixelReweighter:
            return PixelReweighter(
                shadow,
                estimator=config.method.estimator,
                granularity=granularity,
                normalise=config.method.normalise,
                on_zero=config.method.on_zero,
                transform=transform,
                virtual_lr=config.method.virtual_lr,
                initial_weight=config.method.initial_weight,
                sum_over_ranks=sum_over_ranks,
                begin_sum=begin_sum_over_ranks,
                placement=placement,
            )

        self.streams: list[Stream] = []
        noisy, clean, device = self.splits.noisy, self.splits.clean, runtime.device
        self.method = build_method(
            Parts(config, noisy, clean, self.steps, self._open_stream, reweighter, sum_over_ranks, device)
        )

    def run(self, resume: bool, stop_agreed: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Train to the last step and score the test split; returns what result.json holds.

        `stop_agreed`, asked once a step, says the same on every rank. Raises Preempted where it said yes, Diverged
        after `train.max_bad_steps` bad steps in a row, NotSaved where the last checkpoint could not be written.
        """
        config, train, main = self.config, self.config.train, self.runtime.is_main
        validate_every = train.validate_every or max(1, math.ceil(self.steps / 10))
        checkpoint_every = train.checkpoint_every or validate_every
        figure_every = train.figure_every or validate_every

        if main:
            (self.folder / "figures").mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "config.yaml", dump_config(config))
        restored = None
        if resume:
            restored = load_checkpoint(self.checkpoints, self.engine, self.method, config, self.runtime)
        progress = Progress(**restored) if restored else Progress()
        saved_step = progress.step
        guard = Guard(train.max_bad_steps, self.runtime, progress.skipped_steps, progress.skipped_in_a_row)
        log = JsonlLog(self.folder / "metrics.jsonl", from_step=progress.step + 1) if main else None
        tracker = MlflowTracker(config, self.folder) if main and config.tracking.mlflow else None
        bar = tqdm(
            total=self.steps, initial=progress.step, desc=config.name, unit="step", disable=not main,
            mininterval=0.5 if sys.stderr.isatty() else 15,
        )  # fmt: skip
        zero_maps = torch.tensor(progress.zero_maps, device=self.runtime.device, dtype=torch.float64)
        resumed_at, resumed, status, val_dice = progress.step, time.monotonic(), "FAILED", math.nan
        started = resumed - progress.seconds  # as if the run had never stopped

        def report(step: int, metrics: dict[str, float]) -> None:
            if main:
                log.log_metrics(metrics, step)
                if tracker:
                    tracker.log_metrics(metrics, step)

        def save(done: int, best: bool) -> None:
            nonlocal saved_step
            guard.check()
            progress.step, progress.zero_maps = done, zero_maps.item()
            progress.skipped_steps, progress.skipped_in_a_row = guard.skipped, guard.in_a_row
            progress.seconds = time.monotonic() - started
            kept = asdict(progress)
            if save_checkpoint(self.checkpoints, self.engine, self.method, kept, config, self.runtime, best):
                saved_step = done

        try:
            for step in range(progress.step, self.steps):
                logging = (step + 1) % train.log_every == 0 or step + 1 == self.steps
                lr = learning_rate(config.optim, step, self.steps)
                with gradients_put_away(self.engine):
                    batches, diagnostics = self.method.draw(step, diagnose=logging)
                loss, bad = update(self.engine, self.method, batches, lr, self.runtime.shard.world_size)
                guard.record(step + 1, bad, tuple(i for b in batches for i in b.batch.ids))
                zero_maps += diagnostics.get("zero_maps", 0)
                bar.update()

                done = step + 1
                if logging:
                    loss = sum_over_ranks(loss).item()
                    guard.check()
                    speed = (done - resumed_at) * self.images_per_step / (time.monotonic() - resumed)
                    metrics = {"train/loss": loss, "train/lr": lr, "train/images_per_second": speed}
                    metrics["train/skipped_steps"] = guard.skipped
                    metrics["train/seconds_waiting_for_data"] = sum(stream.waited for stream in self.streams)
                    metrics |= {f"meta/{name}": value.item() for name, value in diagnostics.items()}
                    if "zero_maps" in diagnostics:
                        metrics["meta/zero_maps"] = zero_maps.item()
                    report(done, metrics)
                    bar.set_postfix_str(f"loss {loss:.4f}, val Dice {val_dice:.3f}, {speed:.1f} images/s")
                if done % figure_every == 0:
                    figure = self.draw(batches[0], f"{config.name}, step {done}")
                    if main:
                        save_png(figure, self.folder / "figures" / f"step_{done:08d}.png")
                    if tracker:
                        tracker.log_image(figure, "training batch", done)
                best = False
                if done % validate_every == 0 or done == self.steps:
                    scores = summarise(self.score(self.splits.val), "val")
                    val_dice = scores["val/dice"]
                    report(done, scores)
                    best = val_dice > progress.best_dice
                    if best:
                        progress.best_dice, progress.best_step = val_dice, done
                if best or done % checkpoint_every == 0 or done == self.steps:
                    save(done, best)
                if done < self.steps and stop_agreed():
                    if saved_step < done:
                        save(done, best=False)
                    status = "KILLED"
                    raise Preempted(f"stopped after step {done} of {self.steps}, as asked; --resume continues")

            if saved_step < self.steps:
                raise NotSaved(f"{self.checkpoints}: cannot be written to; make room, then --resume")
            progress.seconds = time.monotonic() - started
            result = self._result(progress)
            if main:
                write_atomically(self.folder / "result.json", json.dumps(result, indent=2) + "\n")
                if tracker:
                    for name in ("result.json", TEST_COUNTS):
                        tracker.log_artifact(self.folder / name)
                    if config.tracking.log_model:
                        tracker.log_model(*self._portable_network())
                report(self.steps, {k: v for k, v in result.items() if isinstance(v, int | float) and math.isfinite(v)})
            status = "FINISHED"
        except BadFileError as error:
            kept = f"the checkpoint of step {saved_step}" if saved_step else "the start"
            raise BadFileError(f"{error}; --resume goes on from {kept}") from None
        finally:
            bar.close()
            self.close()
            if log:
                log.close()
            if tracker:
                tracker.finish(status)
        return result

    def score(self, samples: list[Sample]) -> np.ndarray:
        """(n, 4) true and false positives, false and true negatives of each sample, the same on every rank."""
        broadcast_buffers(self.model)
        self.model.eval()
        size, shard = 2 * self.config.train.batch_size, self.runtime.shard
        batches = evaluation_batches(samples, self.config.data, shard, size, self.runtime.device)
        rows = shard.evaluation_batches(len(samples), size)
        most = math.ceil(math.ceil(len(samples) / shard.world_size) / size)

        @torch.no_grad()
        def total(counts: Tensor) -> Tensor:  # a rank with no sample counts on the CPU
            if self.config.deepspeed.zero_stage == 3:
                # Every forward pass gathers parameters, so the ranks with fewer batches take part in the others'.
                side = self.config.data.image_size
                for _ in range(most - len(rows)):
                    self.model(torch.zeros(1, 3, side, side, device=self.runtime.device))
            return sum_over_ranks(counts.to(self.runtime.device))

        counts = evaluate(self.model, batches, rows, len(samples), total)
        self.model.train()
        return counts

    @torch.no_grad()
    def draw(self, weighted: WeightedBatch, caption: str) -> np.ndarray:
        """(h, w, 3) uint8: what the network was shown, told to weigh, and now predicts. Every rank calls it."""
        batch = weighted.batch
        self.model.eval()
        logits = self.model(batch.images).float()
        self.model.train()
        foreground = logits[:, 0].sigmoid() if logits.shape[1] == 1 else 1 - logits.softmax(1)[:, 0]
        weights = weighted.weights.full(batch.masks)
        return panel(batch.pictures, batch.masks, batch.true_masks, weights, foreground, caption)

    def rehearse(self) -> str:
        """One real step and nothing kept: what a run with this config would do."""
        with gradients_put_away(self.engine):
            batches, diagnostics = self.method.draw(0, diagnose=True)
        lr = learning_rate(self.config.optim, 0, self.steps)
        loss, _ = update(self.engine, self.method, batches, lr, self.runtime.shard.world_size)
        loss = sum_over_ranks(loss).item()
        self.close()
        config, splits, shard = self.config, self.splits, self.runtime.shard
        ranks = f"{shard.world_size} ranks ({self.runtime.device.type})"
        counts = f"{len(splits.noisy)} noisy, {len(splits.clean)} clean, {len(splits.val)} val, {len(splits.test)} test"
        lines = [
            f"data       {counts}; wrong pixels in the noisy masks: {splits.noise_rate:.1%}",
            f"network    {config.model.name}, {self.parameter_count:,} parameters, input {config.data.image_size}²",
            f"method     {config.method.name}, estimator {config.method.estimator}",
            f"optimiser  {config.optim.name} ({self.optimizer_kind}), ZeRO stage {config.deepspeed.zero_stage}",
            f"budget     {self.steps} steps of {self.images_per_step} images on {ranks}",
            f"loss       {loss:.4f} on the first batch",
            *(f"meta       {name} {value.item():.4g}" for name, value in diagnostics.items()),
        ]
        return "\n".join(lines)

    def close(self) -> None:
        for stream in self.streams:
            stream.close()

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def images_per_step(self) -> int:
        return self.config.train.batch_size * self.config.train.accumulation * self.runtime.shard.world_size

    def _open_stream(self, name: str, samples: list[Sample], labels: str, batch_size: int) -> Stream:
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
        )
        self.streams.append(stream)
        return stream

    def _portable_network(self) -> tuple[nn.Module, np.ndarray]:
        """A copy of the network without the engine's hooks, and two validation images (2, 3, H, W) as its input."""
        _, network = load_network(self.folder)
        samples, cpu = (2 * self.splits.val)[:2], torch.device("cpu")
        [batch] = evaluation_batches(samples, self.config.data, ShardSpec(), 2, cpu)
        return network.eval(), batch.images.numpy()

    def _result(self, progress: Progress) -> dict[str, Any]:
        counts = self.score(self.splits.test)
        if self.runtime.is_main:
            ids = [sample.id for sample in self.splits.test]
            write_atomically(self.folder / TEST_COUNTS, counts_csv(ids, counts))
        return summarise(counts, "test") | {
            "name": self.config.name,
            "method": self.config.method.name,
            "steps": self.steps,
            "images_per_second": self.steps * self.images_per_step / progress.seconds,
            "seconds": progress.seconds,
            "noise_rate": None if math.isnan(self.splits.noise_rate) else self.splits.noise_rate,
            "clean_count": len(self.splits.clean),
            "best_val_dice": progress.best_dice,
            "best_step": progress.best_step,
            "world_size": self.runtime.shard.world_size,
        }


def update(
    engine: Any, method: Method, batches: list[WeightedBatch], lr: float, world_size: int
) -> tuple[Tensor, Tensor]:
    """One optimiser step on Σ W·ℓ over the micro-batches of all ranks, or none where that is not finite on one of them.

    Returns this rank's part of the loss, a scalar, and `not_finite`'s flags; a step left out changes neither parameters
    nor buffers nor the optimiser's state, on any rank. Nothing here waits for a GPU.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    buffers = list(engine.module.buffers())
    before = [buffer.clone() for buffer in buffers]
    total = torch.zeros((), device=engine.device)
    for weighted in batches:
        logits = engine(weighted.batch.images)
        # The engine averages gradients over ranks; the weights already sum to 1 over ranks and micro-batches. The
        # factor goes into the weights, which spares the gradient of the loss a pass.
        loss = method.loss(logits.float(), weighted.batch.masks, weighted.weights.times(world_size))
        engine.backward(loss, scale_wrt_gas=False)
        total += loss.detach()
        if weighted is not batches[-1]:
            engine.step()
    bad = not_finite(total, reduced_gradients(engine), dist.get_rank(), world_size)
    skip = bad.any()
    skip_update_if(engine, skip)
    engine.step()
    if skipped_by_engine(engine):
        bad[-1] = 1
    for buffer, old in zip(buffers, before, strict=True):
        buffer.copy_(torch.where(skip, old, buffer))
    method.finish_step(lr)
    return total / world_size, bad


def earlier_result(config: Config, folder: Path, resume: Literal["auto", "always"] | None) -> dict[str, Any] | None:
    """What result.json holds if this run has finished; reads only.

    Raises UserError for a folder that holds a run without `resume`, another run's config with it, and where `always`
    finds nothing to resume.
    """
    recorded = folder / "config.yaml"
    if not recorded.exists():
        if resume == "always":
            raise UserError(f"{folder}: no run to resume; leave out --resume, or write --resume auto to start one")
        return None
    if not resume:
        raise UserError(f"{folder}: holds a run already; continue it with --resume, or choose another name=")
    if changed := changed_keys(load_config(recorded), config):
        raise UserError(f"{folder}: --resume with another config: {changed[0]}; choose another name= for a new run")
    result = folder / "result.json"
    return json.loads(result.read_text()) if result.exists() else None


def prepare_data(config: Config, folder: Path, check: bool) -> Splits:
    """Read, check and split the data, and write the noisy masks into `folder`; UserError for what is wrong with it."""
    samples = usable_samples(config.data, folder, check)
    by_split = {split: [s for s in samples if s.split == split] for split in ("train", "val", "test")}
    clean, noisy = split_clean(by_split["train"], config.data.clean_count, config.seed)
    noisy, noise_rate = write_noisy_masks(noisy, config.data.noise, folder / "noisy_masks", config.data.decoding)
    return Splits(clean, noisy, by_split["val"], by_split["test"], noise_rate)


def _number_of_steps(config: Config, noisy_count: int, world_size: int) -> int:
    if config.train.steps is not None:
        return config.train.steps
    per_step = config.train.batch_size * config.train.accumulation * world_size
    return math.ceil(config.train.epochs * noisy_count / per_step)
