import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from distseg.config.load import config_hash, flatten_config, load_config
from distseg.errors import UserError
from distseg.study.plan import StudyRun, load_study, parse_plan, plan_json

EXPERIMENTS = sorted((Path(__file__).parents[2] / "configs" / "experiments").glob("*.yaml"))
STUDY = {
    "name": "study",
    "base": "base.yaml",
    "settings": ["optim.lr=1e-2"],
    "methods": {
        "noisy_only": [],
        "clean_only": ["optim.lr=1e-3"],
        "oracle": [],
        "pixel_reweight": [],
        "with_clean": ["method.name=pixel_reweight", "method.include_clean=true"],
    },
    "noise": [{"kind": "polygon", "vertices": 3}, {"kind": "boundary", "alpha": 0.7, "beta": 0.5}],
    "clean_counts": [10, 50],
    "seeds": [0, 1, 2],
}


@pytest.fixture
def write(tmp_path: Path):
    (tmp_path / "base.yaml").write_text("name: x\ndata: {root: /data}\ntrain: {steps: 10}\n")

    def write(**changes) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(STUDY | changes))
        return path

    return write


def method_keys(run: StudyRun) -> dict[str, Any]:
    """The keys of the method's parts by their last words."""
    leaves = flatten_config(run.config).items()
    return {key.rpartition(".")[2]: value for key, value in leaves if key.startswith("method.")}


def test_the_grid_runs_each_thing_once(write) -> None:
    study, runs = load_study(write())
    assert len({run.name for run in runs}) == len(runs)
    assert Counter(run.method for run in runs) == {
        "noisy_only": 2 * 3,  # no clean image: one run for every K
        "clean_only": 2 * 3,  # no noisy mask: one run for every noise level
        "oracle": 3,
        "pixel_reweight": 2 * 2 * 3,
        "with_clean": 2 * 2 * 3,
    }
    assert {run.seed for run in runs[: len(runs) // 3]} == {0}
    by_method = {run.method: run for run in runs}
    assert method_keys(by_method["with_clean"])["include_clean"] is True
    assert by_method["clean_only"].config.optim.lr == 1e-3 and by_method["oracle"].config.optim.lr == 1e-2
    assert {c.config.data.clean_count for c in runs if c.method == "noisy_only"} == {10}
    assert {c.config.data.noise.kind for c in runs if c.method == "clean_only"} == {"none"}
    assert all(c.config.data.noise.seed == c.seed for c in runs if c.noise != "any")
    assert by_method["pixel_reweight"].tags == {
        "method": "pixel_reweight", "noise": "boundary(0.7, 0.5)", "clean_count": "50", "seed": "2",
    }  # fmt: skip
    assert study.ranks == 1


def test_the_name_follows_from_everything_that_changes_a_result(write) -> None:
    _, before = load_study(write())
    _, same = load_study(write(), ["tracking.experiment=elsewhere"])
    assert [run.name for run in same] == [run.name for run in before]
    _, other = load_study(write(), ["train.steps=11"])
    assert not {run.name for run in other} & {run.name for run in before}
    one = [run for run in before if run.method == "pixel_reweight"]
    _, changed = load_study(write(methods=STUDY["methods"] | {"clean_only": ["optim.lr=2e-3"]}))
    assert {run.name for run in one} < {run.name for run in changed}
    assert before[0].name.endswith(config_hash(before[0].config))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": []}, "seeds: tuple should have at least 1 item"),
        ({"seeds": [1, 1]}, "seeds: one of them is there twice"),
        ({"sedes": [1]}, "sedes: unknown key; did you mean seeds?"),
        ({"methods": {"mine": []}}, "methods.mine: config"),
        ({"noise": [{"kind": "box", "vertices": 3}]}, "noise.0: vertices is no key of box"),
        ({"noise": [{"kind": "box", "vertice": 3}]}, "noise.0.vertice: unknown key; did you mean vertices?"),
        ({"base": "gone.yaml"}, "gone.yaml: no such file"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(write, changes: dict, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_study(write(**changes))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_champion_that_does_not_take_part_is_refused(write) -> None:
    assert load_study(write(champion="with_clean"))[0].champion == "with_clean"
    with pytest.raises(UserError, match=r"champion finetune: is none of methods \(.*oracle"):
        load_study(write(champion="finetune"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_every_experiment_loads(path: Path) -> None:
    _, runs = load_study(path, ["data.root=/data"])
    assert len(runs) > 1


def test_the_experiments_are_there() -> None:
    assert {path.name for path in EXPERIMENTS} >= {"isic2017.yaml", "isic2017_cpu.yaml", "paper.yaml"}


def test_a_mistake_in_a_list_of_sections_is_told(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    noise = "{kind: mixed, annotators: [{kind: box, sede: 1}]}"
    path.write_text(f"name: x\ndata: {{root: /d, noise: {noise}}}\ntrain: {{steps: 1}}")
    with pytest.raises(UserError, match="sede: unknown key; did you mean seed"):
        load_config(path)


def test_a_grid_is_tried_by_every_method_and_one_of_its_own_takes_its_place(write) -> None:
    methods = {
        "noisy_only": [],
        "pixel_reweight": {
            "settings": ["method.clean_phase=0.3"],
            "grid": {"optim.lr": [0.5], "method.granularity": ["pixel", "patch(4)"]},
        },
    }
    grid = {"optim.lr": [1e-3, 0.02], "optim.weight_decay": [0.9]}
    _, runs = load_study(write(methods=methods, grid=grid, seeds=[0], clean_counts=[10]))
    box = [run for run in runs if run.noise == "polygon(3)"]
    assert [(run.method, dict(run.grid)) for run in box] == [
        ("noisy_only", {"optim.lr": "0.001", "optim.weight_decay": "0.9"}),
        ("noisy_only", {"optim.lr": "0.02", "optim.weight_decay": "0.9"}),
        ("pixel_reweight", {"optim.lr": "0.5", "optim.weight_decay": "0.9", "method.granularity": "pixel"}),
        ("pixel_reweight", {"optim.lr": "0.5", "optim.weight_decay": "0.9", "method.granularity": "patch(4)"}),
    ]
    assert [run.config.optim.lr for run in box] == [1e-3, 0.02, 0.5, 0.5]
    assert method_keys(box[3])["granularity"] == "patch(4)" and method_keys(box[3])["clean_phase"] == 0.3
    assert box[0].name.startswith("noisy_only-lr0.001-weight_decay0.9-polygon_3-kany-s0-")
    assert box[3].tags == {
        "method": "pixel_reweight", "noise": "polygon(3)", "clean_count": "10", "seed": "0",
        "optim.lr": "0.5", "optim.weight_decay": "0.9", "method.granularity": "patch(4)",
    }  # fmt: skip


def test_a_method_without_grid_keeps_the_name_that_it_has_without_one(write) -> None:
    _, before = load_study(write())
    _, runs = load_study(write(methods=STUDY["methods"] | {"pixel_reweight": {"grid": {"optim.lr": [1e-3, 2e-3]}}}))
    names = {run.name for run in before if run.method != "pixel_reweight"}
    assert names == {run.name for run in runs if run.method != "pixel_reweight"}
    assert len(names) == 6 + 6 + 3 + 12 and len(runs) == len(names) + 2 * 12


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grid": {"lr": [1]}}, "grid: lr: is no key of the config"),
        ({"grid": {"optim.lr": []}}, "grid.optim.lr: tuple should have at least 1 item"),
        ({"grid": {"optim.lr": [0.1, 0.1]}}, "optim.lr: one of the values is there twice"),
        ({"grid": {"data.noise.kind": ["box"]}}, "data.noise.kind: cannot be in a grid"),
        ({"grid": {"data.clean_count": [1]}}, "data.clean_count: cannot be in a grid"),
        ({"grid": {"seed": [1]}}, "seed: cannot be in a grid, it is an axis already; write its values as seeds of"),
        ({"grid": {"data.noise.seed": [1]}}, "write its values as seeds of the study"),
        ({"grid": {"tracking.mlflow": [True]}}, "tracking.mlflow: cannot be in a grid"),
        ({"methods": {"oracle": []}, "grid": {"optim.rl": [1]}}, "optim.rl: unknown key; known: name, lr"),
        ({"methods": {"oracle": []}, "grid": {"optim.lr": ["fast"]}}, "optim.lr: input should be a valid number"),
        ({"methods": {"oracle": {"grdi": {}}}}, "methods.oracle.grdi: unknown key; did you mean grid?"),
        (
            {"methods": {"oracle": ["optim.lr=1"]}, "grid": {"optim.lr": [0.1]}},
            "methods.oracle: optim.lr=1: the grid varies optim.lr; remove one of the two",
        ),
        (
            {"methods": {"finetune": ["method.clean_phase=0.3"]}, "grid": {"method.phases.clean_phase": [0.1]}},
            "the grid varies method.clean_phase; remove one of the two",
        ),
        ({"methods": {"a\nb": []}}, "methods.a\\nb"),
        ({"methods": {"x" * 300: []}}, "string should have at most 64 characters"),
    ],
)
def test_a_mistake_in_a_grid_is_one_line_that_names_the_key(write, changes: dict, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_study(write(**changes))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_override_of_a_key_of_the_grid_is_refused(write) -> None:
    with pytest.raises(UserError, match=r"optim\.lr=1: the grid varies optim.lr"):
        load_study(write(methods={"oracle": []}, grid={"optim.lr": [0.1]}), ["optim.lr=1"])


def test_a_label_in_any_script_makes_a_name_that_a_folder_can_have(write) -> None:
    _, runs = load_study(write(methods={"模型 / 1": ["method.name=oracle"], "_x": ["method.name=union"]}))
    assert {run.name[:1] for run in runs} <= set("1x") and len({run.name for run in runs}) == len(runs)
    assert {run.method for run in runs} == {"模型 / 1", "_x"}


def test_the_plan_reads_back(write) -> None:
    study, runs = load_study(write(methods={"oracle": []}, grid={"optim.lr": [0.1, 0.2]}, champion="oracle"))
    plan = parse_plan(plan_json(study, runs), "here")
    assert [row.name for row in plan.runs] == [run.name for run in runs]
    assert (plan.champion, plan.grid_keys, plan.noise[0]) == ("oracle", ("optim.lr",), "polygon(3)")
    assert {**plan.runs[-1].grid, "seed": plan.runs[-1].seed} == {"optim.lr": "0.2", "seed": "2"}


def test_long_labels_and_values_make_a_plan_that_reads_back(write) -> None:
    methods = {"x" * 64: ["method.name=pixel_reweight"]}
    grid = {
        "optim.lr": [1.234567890123456e-3, 1.234567890123457e-3],
        "method.granularity": ["pixel", "patch(12)"],
        "data.layout": ["auto"],
        "data.root": ["/" + "d" * 63],
    }
    annotators = [{"kind": "boundary", "alpha": alpha, "beta": 0.75} for alpha in (0.6, 0.7, 0.8, 0.9)]
    noise = [{"kind": "mixed", "annotators": annotators}]
    study, runs = load_study(write(methods=methods, grid=grid, noise=noise))
    plan = parse_plan(plan_json(study, runs), "here")
    assert len({row.name for row in plan.runs}) == len(plan.runs) == 2 * 2 * 2 * 3
    assert max(len(row.name) for row in plan.runs) == 100
    assert all(run.name.endswith(config_hash(run.config)) for run in runs)


@pytest.mark.parametrize("value", ["x" * 65, "", "a\nb"])
def test_a_grid_value_that_tables_cannot_have_is_one_line(write, value: str) -> None:
    with pytest.raises(UserError, match=r"grid: data\.root: keys and values must have 1 to 64 printable") as caught:
        load_study(write(methods={"oracle": []}, grid={"data.root": ["/d", value]}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_noise_with_a_level_that_is_too_long_is_one_line(write) -> None:
    annotators = [{"kind": "boundary", "alpha": 0.5, "beta": 0.5}] * 40
    with pytest.raises(UserError, match=r"noise: mixed\(.*… has more than 500 characters; use fewer annotators$"):
        load_study(write(noise=[{"kind": "mixed", "annotators": annotators}]))


def test_grid_values_that_differ_late_are_cells_of_their_own(write) -> None:
    _, runs = load_study(write(methods={"oracle": []}, grid={"optim.lr": [0.12345678, 0.12345679, 1e-3]}, seeds=[0]))
    assert [run.grid["optim.lr"] for run in runs] == ["0.12345678", "0.12345679", "0.001"]
    assert len({run.name for run in runs}) == 3


@pytest.mark.parametrize("values", [[1, 1.0], [1, "1"], [1000000, 1e6], [True, 1], [True, "true"]])
def test_equal_grid_values_are_refused(write, values: list) -> None:
    with pytest.raises(UserError, match=r"optim\.lr: one of the values is there twice"):
        load_study(write(methods={"oracle": []}, grid={"optim.lr": values}))


@pytest.mark.parametrize(
    "noise",
    [
        [{"kind": "box"}, {"kind": "box"}],
        [{"kind": "boundary", "alpha": 0.7, "beta": b} for b in (0.12345678, 0.12345679)],
    ],
)
def test_noise_levels_of_one_text_are_refused(write, noise: list) -> None:
    with pytest.raises(UserError, match=r"noise: .*is there twice"):
        load_study(write(noise=noise))


@pytest.mark.parametrize(
    ("item", "axis"),
    [
        ("name=mine", "name"),
        ("seed=5", "seeds"),
        ("data.noise.seed=5", "seeds"),
        ("data.noise={kind: box}", "noise"),
        ("data.noise.kind=box", "noise"),
        ("data.clean_count=5", "clean_counts"),
    ],
)
def test_a_setting_of_an_axis_is_refused_in_one_line(write, item: str, axis: str) -> None:
    what = "the study names its runs" if axis == "name" else "is an axis of the study"
    said = re.escape(f"{item}: {what}; remove it, and set {axis} in the study file") + "$"
    with pytest.raises(UserError, match=said):
        load_study(write(), [item])
    with pytest.raises(UserError, match=f"settings: {said}"):
        load_study(write(settings=[item]))
    with pytest.raises(UserError, match=f"methods.oracle: {said}"):
        load_study(write(methods={"oracle": [item]}))


def test_a_noise_level_has_no_seed_of_its_own(write) -> None:
    with pytest.raises(UserError, match=r"polygon\(3\): seed 4: each of seeds draws the masks; remove it"):
        load_study(write(noise=[{"kind": "polygon", "vertices": 3, "seed": 4}]))
