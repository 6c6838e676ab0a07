"""What the benchmarks share: contenders that take turns, and the machine that they ran on."""

import platform
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str,
    prepare: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, in a random order every round, because a machine's speed drifts.

    One more round comes first, to warm up. `prepare` runs, untimed, before each measurement.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    for round_number in range(rounds + 1):
        for name in order.sample(list(contenders), len(contenders)):
            if prepare:
                prepare()
            synchronise(device)
            started = time.perf_counter()
            contenders[name]()
            synchronise(device)
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def describe_machine(device: str) -> dict[str, str | int]:
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else platform.processor()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"device": name, "threads": torch.get_num_threads(), **versions, "date": time.strftime("%Y-%m-%d")}
