"""`distseg COMMAND`: what it costs to ask for help, and how a command ends that nobody listens to any more."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distseg.cli.main import COMMANDS, main
from distseg.testing.forked import run_script, start_script

ROOT = Path(__file__).parents[2]
DISTSEG = [sys.executable, "-m", "distseg.cli.main"]
HEAVY = {"torch", "mlflow", "deepspeed", "matplotlib", "triton"}
CONFIG = """
name: run
data: {image_size: 32, clean_count: 4, pipeline: torch}
model: {width: 4, depth: 1}
train: {steps: 3, batch_size: 2, clean_batch_size: 2}
tracking: {mlflow: false}
"""


def call(*words: str, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"capture_output": True, "cwd": ROOT, "env": environment} | options
    return subprocess.run(words, text=True, timeout=120, **options)


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=lambda words: " ".join(words) or "all")
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\n"
        "from distseg.cli.main import main\n"
        "try:\n"
        f"    main({[*words, '--help']})\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        f"print('heavy:', *sorted({HEAVY} & set(sys.modules)))\n"
    )
    done = call(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: distseg")
    assert done.stdout.splitlines()[-1] == "heavy:"
    assert all(name in done.stdout for name in (words or COMMANDS))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_file_in_launch_is_the_same_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    [launch] = run_script([f"launch/{name}.py", "--help"], ROOT, os.environ)
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert launch.returncode == end.value.code == 0
    usage = " ".join(capsys.readouterr().out.split())
    assert " ".join(launch.stdout.split()) == usage.replace(f"distseg {name}", f"{name}.py", 1)


def test_an_unknown_command_is_told_with_the_known_ones() -> None:
    done = call(*DISTSEG, "trian")
    assert done.returncode == 2
    assert "'train'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["sweep", "configs/experiments/isic2017.yaml", "data.root=/data", "--list"],
        ["prepare", "--config", "CONFIG", "data.root=DATA"],
    ],
    ids=lambda words: words[0],
)
def test_a_reader_that_has_gone_is_no_error(words: list[str], drawn_data: Path, tmp_path: Path, counted) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    words = [word.replace("CONFIG", str(tmp_path / "c.yaml")).replace("DATA", str(drawn_data)) for word in words]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = call(*DISTSEG, *words, stdout=pipe, stderr=subprocess.PIPE, capture_output=False)
    assert (done.returncode, done.stderr) == (0, "")
    counted("closed pipes and full devices", 1)


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_an_error_that_nobody_reads_ends_in_its_exit_code(unbuffered: str, counted) -> None:
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    with os.fdopen(write, "w") as pipe:
        words = (*DISTSEG, "sweep", "gone.yaml")
        done = call(*words, stdout=pipe, stderr=pipe, capture_output=False, env=environment)
    assert done.returncode == 2
    counted("closed pipes and full devices", 1)


def test_results_are_shown_in_a_terminal_of_any_encoding(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "result.json").write_text('{"method": "oracle"}')  # its figures are shown as dashes
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = call(*DISTSEG, "compare", str(tmp_path), env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u2013" in done.stdout


def to_full_device(words: list[str], folder: Path) -> tuple[int | None, str]:
    """Exit code and stderr of a script whose stdout can take nothing."""
    errors = folder / "stderr"
    process = start_script(words, ROOT, os.environ, Path("/dev/full"), errors)
    process.join(120)
    return process.exitcode, errors.read_text()


def test_results_that_go_to_a_full_device_end_in_one_line(tmp_path: Path, counted) -> None:
    words = ["launch/sweep.py", "configs/experiments/paper.yaml", "data.root=/data", "--list"]
    assert to_full_device(words, tmp_path) == (1, "error: standard output: No space left on device\n")
    counted("closed pipes and full devices", 1)


def test_a_run_whose_result_is_written_ends_well_whoever_listens(drawn_data: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    words = ["launch/train.py", "--config", str(tmp_path / "c.yaml"), f"data.root={drawn_data}"]
    code, said = to_full_device([*words, "--runs-dir", str(tmp_path)], tmp_path)
    assert code == 0, said
    assert (tmp_path / "run" / "result.json").exists()
    assert "warning: standard output: No space left on device" in said and "Traceback" not in said


@contextmanager
def interruptible(*words: str) -> Iterator[subprocess.Popen[str]]:
    """distseg as a terminal starts it, which takes SIGINT also where this process was started to ignore it."""
    process = subprocess.Popen(
        [*DISTSEG, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_ctrl_c_in_a_training_is_one_line(drawn_data: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG.replace("steps: 3", "steps: 100000"))
    words = ["train", "--config", str(tmp_path / "c.yaml"), f"data.root={drawn_data}", "--runs-dir", str(tmp_path)]
    log = tmp_path / "run" / "metrics.jsonl"
    with interruptible(*words) as process:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.splitlines()[-1] == "interrupted; --resume continues from the last checkpoint"
    assert "Traceback" not in told


def test_ctrl_c_in_another_command_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.yaml")  # the command waits in reading it
    words = ["prepare", "--config", str(tmp_path / "c.yaml")]
    with interruptible(*words) as process:
        descriptor = os.open(tmp_path / "c.yaml", os.O_WRONLY)  # returns once the command reads
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
        os.close(descriptor)
    assert (process.returncode, told) == (130, "interrupted\n")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    study = ["configs/experiments/paper.yaml", "data.root=/data", "--runs-dir", str(tmp_path / "runs")]
    [done] = run_script(["launch/sweep.py", *study], ROOT, os.environ)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and str(tmp_path / "runs") in line
