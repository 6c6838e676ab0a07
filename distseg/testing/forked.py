"""Processes that start at once: forked from one that has imported torch and DeepSpeed, which takes five seconds."""

import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from distseg.distributed.runtime import free_port


def start(
    function: Callable[..., None], *arguments: Any, environment: Mapping[str, str], output: Path, errors: Path
) -> BaseProcess:
    """`function(*arguments)` in a process with this environment and the caller's working folder, writing to two files.

    `function` must be importable by name. What libraries read from the environment as they are imported, such as
    OMP_NUM_THREADS, is that of the first call. Wait for the process, or kill it. Where there is CUDA, whose runtime
    does not outlive a fork, it is a new one and starts as slowly as any.
    """
    context: Any = mp.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(["distseg.testing.preload"])
    args = (function, arguments, dict(environment), output, errors)
    process: BaseProcess = context.Process(target=_run, args=args, daemon=True)  # which does not outlive the caller
    process.start()
    return process


def start_script(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], output: Path, errors: Path
) -> BaseProcess:
    """`python *arguments` in `folder`, likewise."""
    return start(_run_script, [*arguments], folder, environment=environment, output=output, errors=errors)


def run_script(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], ranks: int = 1, timeout: float = 280
) -> list[subprocess.CompletedProcess[str]]:
    """`python *arguments` in `folder` to its end, on as many ranks; what `subprocess.run` gives, of each.

    Raises TimeoutError after `timeout` seconds; the processes are killed.
    """
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as name:
        files = [(Path(name, f"{rank}.stdout"), Path(name, f"{rank}.stderr")) for rank in range(ranks)]
        processes = []
        for rank in range(ranks):
            own = group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            processes.append(start_script(arguments, folder, {**environment, **own}, *files[rank]))
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        said = [[path.read_text() for path in paths] for paths in files]
    if None in codes:
        raise TimeoutError(f"{arguments[0]}: not done after {timeout} s: {said}")
    return [
        subprocess.CompletedProcess([*arguments], code or 0, *texts) for code, texts in zip(codes, said, strict=True)
    ]


def _run(
    function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], output: Path, errors: Path
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for path, stream in ((output, 1), (errors, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
        os.close(file)
    function(*arguments)


def _run_script(arguments: list[str], folder: Path) -> None:
    os.chdir(folder)
    script = Path(arguments[0]).resolve()
    sys.argv = arguments
    sys.path[:0] = [str(script.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    runpy.run_path(str(script), run_name="__main__")
