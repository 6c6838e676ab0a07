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

    One more round comes first, to warm up. `prepare` runs, untimed, before each measurement. A GPU times by its own
    events: what `prepare` still has to do there hides the launches, and a step that launches little waits for Python.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    time_one = _seconds_on_gpu if device == "cuda" else _seconds_on_cpu
    for round_number in range(rounds + 1):
        for name in order.sample(list(contenders), len(contenders)):
            synchronise(device)
            if prepare:
                prepare()
            taken = time_one(contenders[name])
            if round_number:
                seconds[name].append(taken)
    return seconds


def _seconds_on_cpu(contender: Callable[[], object]) -> float:
    started = time.perf_counter()
    contender()
    return time.perf_counter() - started


def _seconds_on_gpu(contender: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    contender()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def describe_machine(device: str) -> dict[str, str | int]:
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else platform.processor()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"device": name, "threads": torch.get_num_threads(), **versions, "date": time.strftime("%Y-%m-%d")}
