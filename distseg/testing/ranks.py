"""Real ranks for tests: processes in one gloo group on the loopback, with a time limit and nothing left behind."""

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distseg.distributed.ending import leave
from distseg.distributed.runtime import Runtime, free_port, start_runtime, stop_runtime
from distseg.testing.forked import start

RankFunction = Callable[..., dict[str, Tensor]]


def run_ranks(
    function: RankFunction, world_size: int, *arguments: Any, timeout: float = 240
) -> list[dict[str, Tensor]]:
    """`function(runtime, *arguments)` on `world_size` ranks; what each returned, in rank order.

    `function` must be importable by name. Raises RuntimeError with the traceback of the first rank that failed, or
    after `timeout` seconds; the other ranks are killed.
    """
    variables = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            start(
                _rank_main,
                function,
                folder / f"rank_{rank}",
                arguments,
                environment=os.environ | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                output=folder / f"{rank}.stdout",
                errors=folder / f"{rank}.stderr",
            )
            for rank in range(world_size)
        ]
        deadline = time.monotonic() + timeout
        try:
            while any(process.is_alive() for process in processes):
                if any(process.exitcode for process in processes):
                    break
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{function.__name__} on {world_size} ranks: not done after {timeout} s")
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for stream, file in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
                for path in sorted(folder.glob(f"*.{file}")):
                    stream.write(path.read_text())
        errors = sorted(folder.glob("rank_*.error"), key=lambda path: path.stat().st_mtime_ns)
        if errors:
            raise RuntimeError(f"{function.__name__}, {errors[0].stem}:\n{errors[0].read_text()}")
        failed = [rank for rank, process in enumerate(processes) if process.exitcode]
        if failed:
            raise RuntimeError(f"{function.__name__}: rank {failed[0]} died with {processes[failed[0]].exitcode}")
        return [load_file(folder / f"rank_{rank}.safetensors") for rank in range(world_size)]


def _rank_main(function: RankFunction, path: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        runtime: Runtime = start_runtime()
        result = function(runtime, *arguments)
        owned = {name: tensor.contiguous().clone() for name, tensor in result.items()}
        save_file(owned, path.with_suffix(".safetensors"))
        stop_runtime()
        exit_code = 0
    except BaseException:
        path.with_suffix(".error").write_text(traceback.format_exc())
        exit_code = 1
    leave(exit_code)
