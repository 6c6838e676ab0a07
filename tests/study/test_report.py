"""The report's arithmetic, on a tracker that is a dictionary; tests/integration/test_sweep.py has the real one."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from distseg.errors import UserError
from distseg.evaluation.metrics import counts_csv
from distseg.study.analysis import Cell, Incomparable, PairedTest, chosen, collect, make_cells, verdict
from distseg.study.plan import Plan
from distseg.study.report import results_csv, write_report

LEVELS, COUNTS, SEEDS = ["box", "polygon(3)"], [4, 8], [0, 1]
IDS = [f"i{n}" for n in range(40)]


def counts_of(dice: np.ndarray) -> np.ndarray:
    """tp, fp, fn, tn of images of 200 pixels that have these Dice scores, to a hundredth."""
    tp = np.rint(100 * dice).astype(int)
    return np.stack([tp, 100 - tp, 100 - tp, tp * 0], axis=1)


def run_name(method: str, noise: str, k: str, seed: int, grid: dict[str, str] | None) -> str:
    parts = [method, noise.replace("(", "_").replace(")", ""), k, str(seed), *(grid or {}).values()]
    return "-".join(parts)


class Dictionary:
    """What MLflow would answer."""

    def __init__(self) -> None:
        self.run_id, self.children, self.champion = "parent", [], None
        for seed in SEEDS:
            hard = np.random.default_rng(seed).uniform(0.2, 0.6, len(IDS))
            self.add("noisy_only", "box", "any", seed, hard)
            self.add("noisy_only", "polygon(3)", "any", seed, hard - 0.1)
            self.add("clean_only", "any", "4", seed, hard)
            self.add("clean_only", "any", "8", seed, hard + 0.2)
            for noise in LEVELS:
                for k in COUNTS:
                    dice = hard + 0.1 + 0.02 * seed
                    self.add("pixel_reweight", noise, str(k), seed, dice, auroc=[(1, 0.9), (2, 0.7)])

    def add(
        self, method, noise, k, seed, dice, auroc=(), status="FINISHED", name=None, ids=IDS, grid=None, val_dice=0.5
    ):
        tags = {"method": method, "noise": noise, "clean_count": k, "seed": str(seed)}
        metrics = {
            "noise_rate": 0.1 if noise == "box" else 0.2,
            "seconds": 30.0,
            "steps": 10,
            "best_val_dice": val_dice,
        }
        self.children.append({
            "run_id": f"r{len(self.children)}", "name": name or run_name(method, noise, k, seed, grid),
            "status": status,
            "tags": tags, "grid": grid or {}, "params": {}, "metrics": metrics, "history": {"meta/auroc": list(auroc)},
            "texts": {"test_counts.csv": counts_csv(ids, counts_of(dice))},
        })  # fmt: skip

    def read_text(self, artifact):
        return json.dumps(self.plan())

    def plan(self):
        rows = [{"name": child["name"], **child["tags"], "grid": child["grid"]} for child in self.children]
        methods = list(dict.fromkeys(["noisy_only", "clean_only", *(row["method"] for row in rows)]))
        return {
            "name": "study", "methods": methods, "noise": LEVELS, "champion": self.champion, "clean_counts": COUNTS,
            "seeds": SEEDS, "runs": rows,
        }  # fmt: skip

    def runs(self, histories, texts):
        older = self.children[0] | {"status": "RUNNING"}  # an older attempt at the same run
        return [*self.children, older]

    def images(self, run_id, key):
        return {10: b"\x89PNG early", 90: b"\x89PNG late", 50: b"\x89PNG"}


def cells_of(study: Dictionary) -> list[Cell]:
    plan = Plan.model_validate(study.plan())
    finished, _ = collect(study, plan)
    return make_cells(finished, plan)


def rows_of(study: Dictionary) -> dict[tuple[str, str, str], dict[str, str]]:
    rows = csv.DictReader(io.StringIO(results_csv(cells_of(study), Plan.model_validate(study.plan()))))
    return {(row["noise"], row["clean_count"], row["method"]): row for row in rows}


def test_every_cell_is_there_and_a_run_stands_for_the_levels_it_does_not_depend_on() -> None:
    rows = rows_of(Dictionary())
    assert len(rows) == 2 * 2 * 3
    assert rows["box", "4", "clean_only"]["dice_mean"] == rows["polygon(3)", "4", "clean_only"]["dice_mean"]
    assert rows["box", "4", "noisy_only"]["dice_mean"] == rows["box", "8", "noisy_only"]["dice_mean"]
    assert rows["box", "4", "clean_only"]["dice_mean"] != rows["box", "8", "clean_only"]["dice_mean"]


def test_mean_deviation_and_difference_are_those_worked_out_here() -> None:
    row = rows_of(Dictionary())["polygon(3)", "8", "pixel_reweight"]
    means, noisy = [], []
    for seed in SEEDS:
        hard = np.random.default_rng(seed).uniform(0.2, 0.6, len(IDS))
        means.append(np.rint(100 * (hard + 0.1 + 0.02 * seed)).mean() / 100)
        noisy.append(np.rint(100 * (hard - 0.1)).mean() / 100)
    assert float(row["dice_mean"]) == pytest.approx(np.mean(means))
    assert float(row["dice_sd"]) == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
    assert float(row["dice_minus_noisy_only"]) == pytest.approx(np.mean(means) - np.mean(noisy))
    assert float(row["dice_minus_noisy_only_low"]) > 0.2 and float(row["dice_minus_noisy_only_p"]) < 0.001
    assert row["seeds"] == "2"


def test_the_champion_is_held_against_every_other_method_and_where_it_falls_short_is_said(tmp_path: Path) -> None:
    """It is 0.1 above clean_only of K = 4 and 0.1 below that of K = 8; the seeds' means are some hundredths apart."""
    study = Dictionary()
    study.champion = "pixel_reweight"
    told = write_report(study, "run parent", tmp_path).text
    assert "pixel_reweight is above every other method but the oracle" in told and "in 2 of 4 settings" in told
    short = [line for line in told.splitlines() if line.startswith("Not at")]
    assert [line.split(":")[0] for line in short] == ["Not at box, K = 8", "Not at polygon(3), K = 8"]
    assert all("against clean_only (" in line and "noisy_only" not in line for line in short)
    page = (tmp_path / "report.html").read_text()
    assert short[0] in page and "Dice − pixel_reweight" in page
    rows = {(r["noise"], r["clean_count"], r["method"]): r for r in csv.DictReader((tmp_path / "results.csv").open())}
    assert float(rows["box", "8", "clean_only"]["dice_minus_pixel_reweight"]) == pytest.approx(0.09, abs=0.005)
    assert rows["box", "8", "pixel_reweight"]["dice_minus_pixel_reweight"] == ""


def test_a_lead_within_the_seeds_spread_is_none() -> None:
    study = Dictionary()
    for seed in SEEDS:  # on average 0.05 above pixel_reweight of the same level, and 0.2 apart from each other
        study.add("union", "box", "4", seed, np.full(len(IDS), 0.48 + 0.2 * seed))
    by_method = {cell.method: cell for cell in cells_of(study) if (cell.noise, cell.clean_count) == ("box", 4)}
    assert by_method["union"].mean("dice") > by_method["pixel_reweight"].mean("dice")
    assert not by_method["union"].above(by_method["pixel_reweight"], "dice")
    assert "pixel_reweight" in verdict(list(by_method.values()), "union")[1]


def test_one_seed_has_no_spread_to_be_above() -> None:
    study = Dictionary()
    study.children = [child for child in study.children if child["tags"]["seed"] == "0"]
    assert "in 0 of 4 settings" in verdict(cells_of(study), "pixel_reweight")[0]


def test_what_has_not_finished_is_left_out_and_named(tmp_path: Path) -> None:
    study = Dictionary()
    study.add("pixel_reweight", "box", "4", 2, np.full(len(IDS), 1.0), status="KILLED", name="cut-off")
    assert rows_of(study)["box", "4", "pixel_reweight"]["seeds"] == "2"
    told = write_report(study, "run parent", tmp_path).text
    assert "1 of 17 runs have not finished: cut-off" in told


def test_the_report_holds_its_pictures_and_names_its_files(tmp_path: Path) -> None:
    study = Dictionary()
    report = write_report(study, "run parent", tmp_path / "report")
    told = report.text
    assert "polygon(3)  8  pixel_reweight" in told
    names = {"dice_by_noise.png", "dice_by_clean_count.png", "dice_by_wrong_pixels.png", "auroc.png", "cost.png"}
    names |= {f"weights_{level}_{when}.png" for level in (0, 1) for when in ("early", "late")}
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert written == names | {"report.html", "results.csv", "runs.csv"}
    assert {path.name for path in report.files} == written
    assert (tmp_path / "report" / "weights_1_early.png").read_bytes() == b"\x89PNG early"
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == len(names)
    assert "<script" not in page and "http" not in page


def test_a_run_that_is_no_study_is_told(tmp_path: Path) -> None:
    study = Dictionary()
    study.read_text = lambda artifact: None
    with pytest.raises(UserError, match=r"no plan\.json"):
        write_report(study, "run parent", tmp_path)
    empty = Dictionary()
    plan = empty.read_text("plan.json")
    empty.runs, empty.read_text = lambda histories, texts: [], lambda artifact: plan
    with pytest.raises(UserError, match="none of its 16 runs has finished"):
        write_report(empty, "run parent", tmp_path)


def test_runs_are_paired_by_image_where_every_seed_tests_images_of_its_own() -> None:
    """The images of seed 1 are another 40; by position, image n of the one would be averaged with n of the other."""
    study = Dictionary()
    study.children = []
    for seed in SEEDS:
        ids = [f"seed{seed}-{name}" for name in IDS]
        # Sorted the other way round in one of the two runs: only the ids say what belongs together.
        hard = np.random.default_rng(seed).uniform(0.2, 0.6, len(IDS))
        study.add("noisy_only", "box", "any", seed, hard, ids=ids)
        study.add("pixel_reweight", "box", "4", seed, hard[::-1] + 0.1, ids=ids[::-1])
    ours, base = ({cell.method: cell for cell in cells_of(study)}[name] for name in ("pixel_reweight", "noisy_only"))
    test = ours.against(base, "dice")
    assert isinstance(test, PairedTest)
    assert test.images == 80
    assert test.mean == pytest.approx(0.1, abs=2e-3)
    assert test.high - test.low < 0.005  # every image differs by 0.1, to a hundredth's rounding


def test_a_seed_counts_only_the_images_that_both_runs_tested() -> None:
    study = Dictionary()
    study.children = []
    for seed in SEEDS:
        study.add("noisy_only", "box", "any", seed, np.full(40, 0.5))
        other = IDS if seed == 0 else [f"other{n}" for n in range(40)]
        study.add("pixel_reweight", "box", "4", seed, np.full(40, 0.6 + 0.2 * seed), ids=other)
    by_method = {cell.method: cell for cell in cells_of(study)}
    test = by_method["pixel_reweight"].against(by_method["noisy_only"], "dice")
    assert isinstance(test, PairedTest)
    assert (test.images, test.mean) == (40, pytest.approx(0.1))


def test_runs_that_share_no_test_image_have_no_interval_and_no_p_and_it_is_said(tmp_path: Path) -> None:
    study = Dictionary()
    study.champion = "union"
    for seed in SEEDS:
        study.add("union", "box", "4", seed, np.full(len(IDS), 0.99 - 0.01 * seed), ids=[f"x{n}" for n in IDS])
    row = rows_of(study)["box", "4", "union"]
    assert [row[f"dice_minus_noisy_only{part}"] for part in ("", "_low", "_high", "_p")] == [""] * 4
    told = write_report(study, "run parent", tmp_path).text
    page = (tmp_path / "report.html").read_text()
    assert page.count("other test images") > 1
    assert "union is above" in told and "in 0 of 1 settings" in told  # far above, and on other images
    by_method = {cell.method: cell for cell in cells_of(study) if cell.setting == ("box", 4)}
    assert by_method["union"].against(by_method["noisy_only"], "dice") == Incomparable("other test images")


def grid_study() -> Dictionary:
    """Two rates a method: noisy_only is best at 0.01 by validation, and at 0.1 by the test images."""
    study = Dictionary()
    study.children = []
    scores = {("noisy_only", "0.01"): (0.7, 0.5), ("noisy_only", "0.1"): (0.6, 0.55)}
    scores |= {("pixel_reweight", "0.01"): (0.7, 0.6), ("pixel_reweight", "0.1"): (0.8, 0.65)}
    for (method, rate), (val_dice, dice) in scores.items():
        for seed in SEEDS:
            values = np.random.default_rng(seed).uniform(-0.1, 0.1, len(IDS)) + dice
            k = "any" if method == "noisy_only" else "4"
            study.add(method, "box", k, seed, values, grid={"optim.lr": rate}, val_dice=val_dice)
    return study


def test_a_grid_is_an_axis_of_the_report_and_its_points_are_chosen_by_validation(tmp_path: Path) -> None:
    study = grid_study()
    told = write_report(study, "run parent", tmp_path).text
    best = "noisy_only with optim.lr=0.01 (0.700); pixel_reweight with optim.lr=0.1 (0.800)."
    assert f"Best by validation Dice at box, K = 4: {best}" in told
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    at = {(row["clean_count"], row["method"], row["optim.lr"]): row for row in rows}
    places = [("4", "noisy_only"), ("8", "noisy_only"), ("4", "pixel_reweight")]
    assert at.keys() == {(*place, rate) for place in places for rate in ("0.01", "0.1")}
    # Each point is held against the chosen point of noisy_only, and not against the one of the best test Dice.
    assert float(at["4", "pixel_reweight", "0.1"]["dice_minus_noisy_only"]) == pytest.approx(0.15, abs=1e-3)
    assert float(at["4", "pixel_reweight", "0.01"]["dice_minus_noisy_only"]) == pytest.approx(0.1, abs=1e-3)
    rates = [row["optim.lr"] for row in csv.DictReader((tmp_path / "runs.csv").open())]
    assert rates == ["0.01", "0.01", "0.1", "0.1"] * 2
    assert (tmp_path / "grid_0_optim_lr.png").exists()
    assert {(cell.method, cell.grid["optim.lr"]) for cell in chosen(cells_of(study))} == {
        ("noisy_only", "0.01"), ("pixel_reweight", "0.1"),
    }  # fmt: skip


SCRIPT = "<script>alert(1)</script>"


def test_every_text_of_a_plan_is_escaped_in_the_page(tmp_path: Path) -> None:
    study = Dictionary()
    study.add(SCRIPT, SCRIPT, "4", 0, np.full(len(IDS), 0.5), name="foreign", grid={SCRIPT: '"><img src=x>'})
    text = study.read_text("plan.json").replace("polygon(3)", "$\\\\frac{$").replace('"box"', json.dumps(SCRIPT))
    study.read_text = lambda artifact: text
    write_report(study, "run parent", tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "<img src=x>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "$\\frac{$" in page


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": [SCRIPT]}, "seeds.0"),
        ({"seeds": 0}, "seeds"),
        ({"clean_counts": [SCRIPT]}, "clean_counts.0"),
        ({"clean_counts": []}, "clean_counts"),
        ({"noise": [3]}, "noise.0"),
        ({"noise": ["a\nb"]}, "noise.0"),
        ({"methods": {}}, "methods"),
        ({"name": "../up"}, "name"),
        ({"runs": [{"name": "a"}]}, "runs.0.method: required"),
        ({"runs": None}, "runs"),
        ({"extra": 1}, "extra: unknown key"),
    ],
)
def test_a_plan_that_is_none_is_one_line(tmp_path: Path, change: dict, said: str) -> None:
    study = Dictionary()
    study.read_text = lambda artifact: json.dumps(study.plan() | change)
    with pytest.raises(UserError) as caught:
        write_report(study, "run parent", tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("plan.json of run parent: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"name": "\\ud800"}', "\x00"])
def test_a_plan_that_is_no_json_is_one_line(tmp_path: Path, text: str) -> None:
    study = Dictionary()
    study.read_text = lambda artifact: text
    with pytest.raises(UserError, match=r"plan\.json of run parent: "):
        write_report(study, "run parent", tmp_path)


@pytest.mark.parametrize("seed", ["", "x", "-1", "1e3", "١", "9" * 5000])
def test_a_seed_that_is_none_is_one_line(tmp_path: Path, seed: str) -> None:
    study = Dictionary()
    study.children[0]["tags"]["seed"] = seed
    with pytest.raises(UserError, match=r"runs\.0\.seed"):
        write_report(study, "run parent", tmp_path)


def test_test_counts_that_are_none_are_one_line(tmp_path: Path) -> None:
    study = Dictionary()
    study.children[3]["texts"]["test_counts.csv"] = "id,tp,fp,fn,tn\na,b,c,d,e\n"
    with pytest.raises(UserError, match=r"test_counts\.csv of run .*: row 2"):
        write_report(study, "run parent", tmp_path)


def test_a_label_that_a_spreadsheet_would_calculate_is_text_in_the_tables(tmp_path: Path) -> None:
    study = Dictionary()
    study.add('=HYPERLINK("x")', "box", "4", 0, np.full(len(IDS), 0.5), name="formula")
    write_report(study, "run parent", tmp_path)
    for name in ("results.csv", "runs.csv"):
        cells = [row["method"] for row in csv.DictReader((tmp_path / name).open())]
        assert any("HYPERLINK" in cell for cell in cells)
        assert not any(cell.startswith("=") for cell in cells)


def test_a_plan_of_an_older_version_is_read() -> None:
    study = Dictionary()
    old = study.plan()
    old["children"] = [{key: value for key, value in row.items() if key != "grid"} for row in old.pop("runs")]
    assert Plan.model_validate(old) == Plan.model_validate(study.plan())


class OfClasses(Dictionary):
    """The same, of three classes: the second foreground class is half as good as the first."""

    def add(self, method, noise, k, seed, dice, **others):
        super().add(method, noise, k, seed, dice, **others)
        ids = others.get("ids", IDS)
        counts = np.stack([counts_of(dice), counts_of(np.asarray(dice) / 2)], axis=1)
        text = counts_csv(ids, counts, ("skin", "lesion", "hair"))
        self.children[-1]["texts"] = {"test_counts.csv": text}


def test_classes_have_a_table_of_their_own_and_the_scores_are_macro_means(tmp_path: Path) -> None:
    two, three = rows_of(Dictionary()), rows_of(OfClasses())
    for place, row in three.items():
        of_each = [float(row[f"dice_{name}_mean"]) for name in ("lesion", "hair")]
        assert float(row["dice_mean"]) == pytest.approx(np.mean(of_each))
        assert of_each[0] == pytest.approx(float(two[place]["dice_mean"]))
        assert of_each[1] == pytest.approx(of_each[0] / 2, abs=0.01)
    assert not any(column.startswith("dice_lesion") for column in two["box", "4", "noisy_only"])
    write_report(OfClasses(), "here", tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Dice of each class" in page and "macro means over lesion, hair" in page
    write_report(Dictionary(), "here", tmp_path)
    assert "of each class" not in (tmp_path / "report.html").read_text()
