"""Real ranks for tests: processes in one gloo group on the loopback, with a time limit and nothing left behind."""

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from distseg.distributed.ending import leave
from distseg.distributed.runtime import Runtime, free_port, start_runtime, stop_runtime

RankFunction = Callable[..., dict[str, Tensor]]


def run_ranks(
    function: RankFunction, world_size: int, *arguments: Any, timeout: float = 240
) -> list[dict[str, Tensor]]:
    """`function(runtime, *arguments)` on `world_size` ranks; what each returned, in rank order.

    `function` must be importable by name. Raises RuntimeError with the traceback of the first rank that failed, or
    after `timeout` seconds; the other ranks are killed.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        processes = [
            context.Process(target=_rank_main, args=(function, rank, world_size, port, folder, arguments), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
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
        errors = sorted(Path(folder).glob("rank_*.error"), key=lambda path: path.stat().st_mtime_ns)
        if errors:
            raise RuntimeError(f"{function.__name__}, {errors[0].stem}:\n{errors[0].read_text()}")
        failed = [rank for rank, process in enumerate(processes) if process.exitcode]
        if failed:
            raise RuntimeError(f"{function.__name__}: rank {failed[0]} died with {processes[failed[0]].exitcode}")
        return [load_file(Path(folder) / f"rank_{rank}.safetensors") for rank in range(world_size)]


def _rank_main(function: RankFunction, rank: int, world_size: int, port: int, folder: str, arguments: tuple) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in (variables | {"MASTER_PORT": port}).items()})
    torch.set_num_threads(1)
    try:
        runtime: Runtime = start_runtime()
        result = function(runtime, *arguments)
        owned = {name: tensor.contiguous().clone() for name, tensor in result.items()}
        save_file(owned, f"{folder}/rank_{rank}.safetensors")
        stop_runtime()
        exit_code = 0
    except BaseException:
        Path(folder, f"rank_{rank}.error").write_text(traceback.format_exc())
        exit_code = 1
    leave(exit_code)
