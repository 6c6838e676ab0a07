"""Steps of the trainer on drawn images: images per second, and the share of the time that a step waits for data."""

import importlib.util
import tempfile
import time
from pathlib import Path

import torch

from distseg.config.load import load_config
from distseg.data.synthetic import write_dataset
from distseg.distributed.runtime import Runtime, set_arithmetic, start_runtime, stop_runtime
from distseg.training.train_step import train_step
from distseg.training.trainer import Trainer
from gpu_stages.findings import Findings, Setting

ROOT = Path(__file__).parents[2]
METHODS = ("noisy_only", "pixel_reweight", "label_correction")


def measure(setting: Setting, findings: Findings) -> None:
    """The paper's network at 96²; the warm-up, in which nothing is weighted, is left out."""
    runtime = start_runtime()
    set_arithmetic(deterministic=False, tf32=True)
    pipelines = ("torch", "dali") if importlib.util.find_spec("nvidia") and _dali_is_there() else ("torch",)
    with tempfile.TemporaryDirectory() as folder:
        counts = {"train": 24 if setting.tiny else 96, "val": 4, "test": 4}
        write_dataset(Path(folder, "data"), counts, size=48 if setting.tiny else 256, seed=0)
        for pipeline in pipelines:
            for method in METHODS:
                for precision in ("fp32", "bf16"):
                    row = measure_one(Path(folder), runtime, method, pipeline, precision, setting.tiny)
                    findings.add("one rank, 6 + 6 images a step", row)
    stop_runtime()


def _dali_is_there() -> bool:
    return importlib.util.find_spec("nvidia.dali") is not None


def measure_one(
    folder: Path, runtime: Runtime, method: str, pipeline: str, precision: str, tiny: bool
) -> dict[str, str | float]:
    overrides = [
        f"data.root={folder / 'data'}", "name=gpu", "tracking.mlflow=false", f"method.name={method}",
        f"data.pipeline={pipeline}", f"train.precision={precision}", "data.clean_count=12",
        "train.epochs=null", "train.steps=1000", "train.batch_size=6", "train.clean_batch_size=6",
        *(["data.image_size=16", "model.width=4", "model.depth=1"] if tiny else ["data.image_size=96"]),
    ]  # fmt: skip
    config = load_config(ROOT / "configs" / "paper.yaml", overrides)
    warm_up, steps = (2, 3) if tiny else (10, 40)
    trainer = Trainer(config, folder / "run", runtime)
    for step in range(warm_up + steps):
        if step == warm_up:
            _wait(runtime)
            started, waited = time.perf_counter(), sum(stream.waited for stream in trainer.streams)
        train_step(trainer.engine, trainer.method, 800 + step, config.optim.lr)
    _wait(runtime)
    seconds = time.perf_counter() - started
    waited = sum(stream.waited for stream in trainer.streams) - waited
    trainer.close()
    return {
        "method": method,
        "loader": pipeline,
        "precision": precision,
        "images/s": steps * trainer.images_per_step / seconds,
        "waiting %": 100 * waited / seconds,
    }


def _wait(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
