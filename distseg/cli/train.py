"""Train one experiment.

    deepspeed launch/train.py --config configs/isic2017.yaml data.root=PATH [section.key=value …] [--resume [auto]]
    python launch/train.py --config …                 # the same as one process

Exit codes: 0 done; 2 bad config or data, one line on stderr; 75 stopped by SIGTERM or SIGUSR1 after a checkpoint, so
submit it again; 1 anything else.
"""

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from distseg.cli.process import INTERRUPTED, run_command, say, say_in_passing, tell, tell_error
from distseg.distributed.ending import leave
from distseg.errors import BadFileError, UserError

if TYPE_CHECKING:
    from distseg.config.schema import Config
    from distseg.distributed.runtime import Runtime
    from distseg.distributed.watchdog import Watchdog

PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: not done, and no fault of the run's."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Train; returns the exit code. The process must then end by `leave`."""
    arguments = parse_arguments(argv, prog)
    # Late: help must not wait for what a config needs.
    from distseg.config.load import load_config

    try:
        return run(load_config(arguments.config, arguments.overrides), arguments)
    except UserError as error:
        # All ranks meet the same bad config, and one of them tells it.
        if _is_first_rank() or isinstance(error, BadFileError):
            tell_error(error)
        return 2
    except KeyboardInterrupt:
        if _is_first_rank():
            tell("interrupted; --resume continues from the last checkpoint")
        return INTERRUPTED
    except OSError:
        raise
    except Exception:
        traceback.print_exc()
        return 1


def run(config: "Config", arguments: argparse.Namespace) -> int:
    """Join the other ranks, train, and take leave of them; returns the exit code."""
    # Late, so that a wrong key is told at once and not after the seconds that torch and DeepSpeed take to import.
    from distseg.distributed.collectives import FailedElsewhere
    from distseg.distributed.runtime import set_arithmetic, start_runtime, stop_runtime
    from distseg.distributed.watchdog import Watchdog
    from distseg.training.guard import Diverged
    from distseg.training.trainer import NotSaved, Preempted

    set_arithmetic(config.train.deterministic, config.train.tf32)
    runtime = start_runtime()
    watchdog = Watchdog(runtime.shard)
    code = 1
    try:
        train(config, arguments, runtime, watchdog)
        code = 0
    except UserError:
        code = 2
        raise
    except FailedElsewhere:
        code = watchdog.exit_code if watchdog.other_rank_ended() else 2
    except Preempted as stop:
        code = PREEMPTED
        if runtime.is_main:
            tell(f"{config.name}: {stop}")
    except (Diverged, NotSaved, OSError) as error:
        if runtime.is_main or isinstance(error, OSError):
            tell_error(error)
    except RuntimeError:
        if not watchdog.other_rank_ended():  # a collective that another rank has left fails here, too
            raise
        code = watchdog.exit_code
    finally:
        watchdog.close(0 if code == PREEMPTED else code)
        stop_runtime()
    return code


def train(config: "Config", arguments: argparse.Namespace, runtime: "Runtime", watchdog: "Watchdog") -> None:
    """Train the run of this config, or rehearse it, and print the outcome on the main rank."""
    from distseg.distributed.collectives import decided_by_main, main_rank_first
    from distseg.run_folder import RunFolder
    from distseg.run_lock import run_lock
    from distseg.study.records import read_result
    from distseg.training.trainer import Trainer, has_finished

    if arguments.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            plan = Trainer(config, Path(folder), runtime).rehearse()
        if runtime.is_main:
            say(plan)
        return
    folder = arguments.runs_dir / config.name
    if not decided_by_main(lambda: has_finished(config, folder, arguments.resume), runtime.device):
        with ExitStack() as stack:
            main_rank_first(lambda: runtime.is_main and stack.enter_context(run_lock(folder)), runtime.device)
            Trainer(config, folder, runtime).run(arguments.resume is not None, watchdog.stop_agreed)
    if runtime.is_main:
        run = RunFolder(folder)
        say_in_passing(f"{config.name}: test Dice {read_result(run).dice:.3f}; {run.result}")


def parse_arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="a YAML file of configs/")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs/<name>/ go")
    parser.add_argument(
        "--resume", choices=("auto", "always"), metavar="auto",
        help="continue the run of this name from its last checkpoint; `auto` starts it if there is none",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="build everything, make one step, keep nothing")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher appends it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    # `--resume` alone must not take the override after it for its value, as an optional value of argparse would.
    given: list[str] = []
    for word in sys.argv[1:] if argv is None else argv:
        if word == "auto" and given[-1:] == ["--resume=always"]:
            given[-1] = "--resume=auto"
        else:
            given.append("--resume=always" if word == "--resume" else word)
    return parser.parse_intermixed_args(given)


def _is_first_rank() -> bool:
    # Under srun a rank has no RANK before it starts.
    return (os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")) == "0"


if __name__ == "__main__":
    leave(run_command(main))
