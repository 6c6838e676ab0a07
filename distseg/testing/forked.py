"""Processes that start at once: forked from one that has imported torch and DeepSpeed, which takes five seconds."""

import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def start(
    function: Callable[..., None], *arguments: Any, environment: Mapping[str, str], output: Path, errors: Path
) -> BaseProcess:
    """`function(*arguments)` in a process with this environment and the caller's working folder, writing to two files.

    `function` must be importable by name. The caller waits for the process, or kills it. Where there is CUDA, whose
    runtime does not outlive a fork, it is a new one and starts as slowly as any.
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
