"""`compare` on folders that are written here, as training would leave them and as anybody might."""

import json
import os
from pathlib import Path

import pytest
import yaml

from distseg.cli.compare import main
from distseg.errors import UserError
from distseg.study.comparison import differing_keys, group_runs, read_run
from distseg.study.records import read_history
from distseg.study.tables import groups_table, results_table

CONFIG = {
    "name": "run",
    "seed": 0,
    "data": {"clean_count": 10, "noise": {"kind": "polygon", "seed": 0}, "threads": 1},
    "optim": {"lr": 0.01},
    "deepspeed": {"zero_stage": 0},
    "train": {"batch_size": 8, "log_every": 10},
    "tracking": {"uri": None, "tags": {}},
}
RESULT = {
    "method": "pixel_reweight",
    "test/dice": 0.7664,
    "test/dice_low": 0.75,
    "test/dice_high": 0.78,
    "test/jaccard": 0.65,
    "test/sensitivity": 0.8,
    "test/specificity": 0.975,
    "noise_rate": 0.1123,
    "steps": 1090,
    "seconds": 702.0,
    "world_size": 1,
}


def run_folder(tmp_path: Path, name: str, result: dict | None = None, **changes) -> Path:
    """A finished run; `changes` are dotted keys of its config, with __ for the dot."""
    config = yaml.safe_load(yaml.safe_dump(CONFIG | {"name": name}))
    for key, value in changes.items():
        *sections, leaf = key.split("__")
        section = config
        for part in sections:
            section = section.setdefault(part, {})
        section[leaf] = value
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "result.json").write_text(json.dumps(RESULT | (result or {})))
    (folder / "metrics.jsonl").write_text('{"step": 1, "val/dice": 0.5}\n')
    return folder


def test_runs_are_grouped_by_everything_that_differs_but_seed_and_name(tmp_path: Path) -> None:
    def seeds(prefix: str, dice: list[float], **changes) -> list[Path]:
        return [
            run_folder(tmp_path, f"{prefix}{seed}", {"test/dice": d}, seed=seed, data__noise__seed=seed, **changes)
            for seed, d in enumerate(dice)
        ]

    folders = seeds("few", [0.5, 0.6])
    folders += seeds("many", [0.7, 0.8, 0.9], data__clean_count=50)
    folders += seeds("large", [0.4], train__batch_size=16)
    folders += [run_folder(tmp_path, "two_ranks", {"test/dice": 0.3, "world_size": 2})]
    folders += [run_folder(tmp_path, "elsewhere", {"test/dice": 0.7}, data__threads=8, tracking__uri="sqlite:///x")]

    groups = group_runs([read_run(folder) for folder in folders])

    assert [[run.path.name for run in group.runs] for group in groups] == [
        ["few0", "few1", "elsewhere"], ["many0", "many1", "many2"], ["large0"], ["two_ranks"],
    ]  # fmt: skip
    assert differing_keys(groups) == ["data.clean_count", "ranks", "train.batch_size"]
    assert groups_table(groups).splitlines() == [
        "method          data.clean_count  ranks  train.batch_size  runs      test Dice        Jaccard",
        "--------------  ----------------  -----  ----------------  ----  -------------  -------------",
        "pixel_reweight                10      1                 8     3  0.600 ± 0.100  0.650 ± 0.000",
        "pixel_reweight                50      1                 8     3  0.800 ± 0.100  0.650 ± 0.000",
        "pixel_reweight                10      1                16     1          0.400          0.650",
        "pixel_reweight                10      2                 8     1          0.300          0.650",
    ]


def test_runs_that_differ_in_what_changes_no_result_are_one_group(tmp_path: Path) -> None:
    changes = [
        {},
        {"data__device_memory": 0},
        {"data__memory": 0},
        {"deepspeed__zero_stage": 2},
        {"deepspeed__config_file": "a.json"},
        {"train__log_every": 1},
    ]
    runs = [read_run(run_folder(tmp_path, f"run{index}", **change)) for index, change in enumerate(changes)]
    other_data = read_run(run_folder(tmp_path, "other_data", data__root="/elsewhere"))
    assert [len(group.runs) for group in group_runs([*runs, other_data])] == [len(changes), 1]


def test_keys_that_differ_between_methods_only_need_no_column(tmp_path: Path) -> None:
    one = run_folder(tmp_path, "one")
    other = run_folder(tmp_path, "other", {"method": "oracle"}, optim__lr=0.1)
    assert differing_keys(group_runs([read_run(one), read_run(other)])) == []


def test_what_a_group_is_is_said_where_there_is_one(tmp_path: Path, capsys) -> None:
    folders = [run_folder(tmp_path, f"s{seed}", seed=seed) for seed in range(2)]
    assert main([str(folder) for folder in folders]) == 0
    assert "mean ± standard deviation of runs that differ in seed and name only" in capsys.readouterr().out
    folders[1:] = [run_folder(tmp_path, "other", data__clean_count=50)]
    assert main([str(folder) for folder in folders]) == 0
    assert "±" not in capsys.readouterr().out


def test_the_table_of_results_for_a_terminal(tmp_path: Path) -> None:
    runs = [read_run(run_folder(tmp_path, "a"))]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.yaml").write_text("{}")
    (tmp_path / "b" / "result.json").write_text('{"method": "oracle", "test/dice": null}')
    assert results_table([*runs, read_run(tmp_path / "b")]).splitlines() == [
        "method              test Dice [95 %]  Jaccard  sensitivity  specificity  noise rate  steps  minutes",
        "--------------  --------------------  -------  -----------  -----------  ----------  -----  -------",
        "pixel_reweight  0.766 [0.750, 0.780]    0.650        0.800        0.975       11.2%   1090     11.7",
        "oracle                             –        –            –            –           –      –        –",
    ]


def test_runs_of_one_method_are_told_apart_by_their_names(tmp_path: Path) -> None:
    table = results_table([read_run(run_folder(tmp_path, name)) for name in ("a", "b")])
    assert [line.split()[:2] for line in table.splitlines()[2:]] == [["pixel_reweight", "a"], ["pixel_reweight", "b"]]


def test_the_table_of_results_in_markdown(tmp_path: Path) -> None:
    runs = [read_run(run_folder(tmp_path, "a")), read_run(run_folder(tmp_path, "b", {"method": "or|acle"}))]
    header, rule, row, second = results_table(runs, markdown=True).splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")][:2] == ["method", "test Dice [95 %]"]
    assert [cell.strip().endswith("-:") for cell in rule.strip("|").split("|")] == [False] + [True] * 7
    assert "| 0.766 [0.750, 0.780] |" in row and "or\\|acle" in second
    assert len({len(line) for line in (header, rule, row, second)}) == 1


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"method": 3}',
        b'{"method": ["a"]}',
        b'{"method": "a", "test/dice": "0.5"}',
        b'{"method": "a", "test/dice": NaN}',
        b'{"method": "a", "test/dice": 1e999}',
        b'{"method": "a", "test/dice": [0.5]}',
        b'{"method": "a", "test/dice": true}',
        b'{"method": "a", "test/dice": 2}',
        b'{"method": "a", "steps": 1e400}',
        b'{"method": "a", "steps": ' + b"9" * 5000 + b"}",
        b'{"method": "a", "seconds": {"x": 1}}',
        b'{"method": "a", "seconds": -1}',
        b'{"method": "' + b"x" * 10_000 + b'"}',
        b'{"method": "\\ud800"}',
    ],
    ids=range(22),
)
def test_an_odd_result_is_one_line(tmp_path: Path, text: bytes, counted) -> None:
    folder = run_folder(tmp_path, "run")
    (folder / "result.json").write_bytes(text)
    with pytest.raises(UserError) as caught:
        main([str(folder)])
    assert str(folder / "result.json") in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(folder)) + 300
    counted("odd files in the folder of a run that is compared", 1)


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b"{}",
        b"3",
        b"{",
        b"\xff",
        b'{"step": "1"}',
        b'{"step": true}',
        b'{"step": -1}',
        b'{"step": 1.5}',
        b'{"step": 1, "val/dice": "high"}',
        b'{"step": 1, "val/dice": [1]}',
        b'{"step": 1, "val/dice": NaN}',
        b'{"step": 1, "val/dice": 7}',
        b'{"step": ' + b"9" * 30 + b"}",
        b"[" * 100_000,
    ],
    ids=range(15),
)
def test_odd_metrics_are_one_line_that_names_the_line(tmp_path: Path, line: bytes, counted) -> None:
    folder = run_folder(tmp_path, "run")
    (folder / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(UserError) as caught:
        read_history(folder / "metrics.jsonl")
    assert str(caught.value).startswith(f"{folder / 'metrics.jsonl'}: line 2: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(folder)) + 300
    counted("odd files in the folder of a run that is compared", 1)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"3",
        b"[1]",
        b"\xff",
        b"a: [",
        b"{" * 5000,
        b"a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        b"!!python/object/apply:os.system ['true']",
        b"a: !!int x",
    ],
    ids=range(9),
)
def test_an_odd_config_is_one_line(tmp_path: Path, text: bytes, counted) -> None:
    folder = run_folder(tmp_path, "run")
    (folder / "config.yaml").write_bytes(text)
    with pytest.raises(UserError) as caught:
        main([str(folder)])
    assert str(folder / "config.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)
    counted("odd files in the folder of a run that is compared", 1)


@pytest.mark.parametrize("name", ["result.json", "config.yaml"])
@pytest.mark.parametrize("kind", ["missing", "pipe", "folder", "dangling link", "device"])
def test_what_is_no_file_is_one_line_and_no_wait(tmp_path: Path, name: str, kind: str) -> None:
    path = run_folder(tmp_path, "run") / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError) as caught:
        main([str(tmp_path / "run")])
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_picture_of_a_run_of_foreign_code_runs_none_unless_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaves_a_mark.py").write_text("open('mark', 'w')\nfrom torch.nn import Conv2d as Net\n")
    monkeypatch.chdir(tmp_path)
    own = {
        "model__name": "leaves_a_mark:Net",
        "model__options": {"in_channels": 3, "out_channels": 1, "kernel_size": 1},
    }
    folder = run_folder(tmp_path, "foreign", data__root=str(tmp_path), train__steps=1, **own)
    with pytest.raises(UserError, match=r"leaves_a_mark:Net.*--allow-import"):
        main([str(folder), "--figure", str(tmp_path / "figure.png")])
    assert not (tmp_path / "mark").exists()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        main([str(folder), "--figure", str(tmp_path / "figure.png"), "--allow-import"])
    assert (tmp_path / "mark").exists()


def test_foreign_text_reaches_the_terminal_escaped(tmp_path: Path, capsys) -> None:
    folder = run_folder(tmp_path, "run", {"method": "a\x1b[31m\nerror: forged"})
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and out.count("\n") == 3
