"""Bad files: each is found and named, by `prepare` and by what the trainer asks, and none of them hangs."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from bad_files import write_bad_data

from distseg.data.checks import usable_samples
from distseg.data.config import DataConfig
from distseg.errors import UserError
from distseg.text import for_csv, for_terminal

ROOT = Path(__file__).parents[2]
CONFIG = "name: x\ndata: {image_size: 32, clean_count: 1}\nmodel: {depth: 2}\ntrain: {steps: 1}\n"


@pytest.fixture
def bad_data(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    return tmp_path / "data", write_bad_data(tmp_path / "data")


def prepare(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    config = folder / "x.yaml"
    config.write_text(CONFIG)
    command = [sys.executable, "launch/prepare.py", "--config", str(config), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_prepare_finds_and_names_every_kind_of_bad_file(bad_data, tmp_path):
    root, expected = bad_data
    done = prepare(tmp_path, f"data.root={root}", "--report", str(tmp_path / "report"), "--cache", str(tmp_path / "c"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: {root}: ") and "data.on_bad=skip" in done.stderr
    assert not (tmp_path / "c").exists()

    report = json.loads((tmp_path / "report" / "report.json").read_text())
    reasons: dict[str, list[str]] = {}
    for problem in report["problems"]:
        reasons.setdefault(problem["id"], []).append(f"{problem['file']}: {problem['reason']}")
    assert len(expected) >= 50
    assert reasons.keys() == expected.keys()
    for id, said in expected.items():
        assert any(said in reason for reason in reasons[id]), (id, said, reasons[id])
        assert all("\n" not in reason for reason in reasons[id])
        if id.startswith(("image-", "mask-")):
            kind = id.split("-")[0]
            assert all(reason.startswith(str(root / f"{kind}s" / f"{id}.png")) for reason in reasons[id])
    assert report["good"] == {"train": 5, "val": 2, "test": 2}

    text = (tmp_path / "report" / "report.txt").read_text()
    with (tmp_path / "report" / "report.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert table == [{key: for_csv(said) for key, said in problem.items()} for problem in report["problems"]]
    assert not any(row["id"].startswith(("=", "+", "-", "@")) for row in table)
    assert all(for_terminal(f"{each['file']}: {each['reason']}") in text for each in report["problems"])


def test_bad_files_are_refused_or_left_out_by_name(bad_data, tmp_path, caplog):
    root, expected = bad_data
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"and \d\d more") as raised:
        usable_samples(DataConfig(root=root), run, check=True)
    assert "\n" not in str(raised.value) and not run.exists()

    skipping = DataConfig(root=root, on_bad="skip")
    samples = usable_samples(skipping, run, check=True)
    assert [sample.id for sample in samples] == [f"good{number}" for number in range(9)]
    with (run / "left_out.csv").open(newline="") as file:
        assert {row["id"] for row in csv.DictReader(file)} == set(map(for_csv, expected))
    [said] = caplog.messages
    assert said.startswith(f"left out {len(expected)} samples") and "left_out.csv" in said

    # A rank that does not check takes the main rank's word: it must not look into the files again.
    for path in (root / "images").glob("good*"):
        path.write_bytes(b"")
    assert usable_samples(skipping, run, check=False) == samples
    with pytest.raises(UserError, match="other files are bad now"):
        usable_samples(skipping, run, check=True)


def test_links_out_of_the_root_can_be_allowed(bad_data, tmp_path):
    root, _ = bad_data
    allowed = usable_samples(DataConfig(root=root, on_bad="skip", follow_links=True), tmp_path / "run", check=True)
    assert "image-link-out-of-root" in {sample.id for sample in allowed}
    (tmp_path / "linked").symlink_to(root)  # the root itself may be a link
    through = usable_samples(DataConfig(root=tmp_path / "linked", on_bad="skip"), tmp_path / "run2", check=True)
    assert [sample.id for sample in through] == [f"good{number}" for number in range(9)]


def test_leaving_out_must_leave_every_split_something(bad_data, tmp_path):
    root, _ = bad_data
    for number in (2, 6):
        (root / "images" / f"good{number}.png").unlink()
    with pytest.raises(UserError, match="the val split is empty"):
        usable_samples(DataConfig(root=root, on_bad="skip"), tmp_path / "run", check=True)
